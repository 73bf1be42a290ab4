//! The file: a head, blocks of faults, an end.
//!
//! ```text
//! head    "UFFTRACE", version u16, page size (its logarithm) u16, image size u64, identity 32 bytes, start u64, CRC-32
//! block   kind u8 = 1, payload length u24, faults u32, CRC-32 of these eight bytes and the payload, payload
//! end     kind u8 = 2, the same, payload: how it ends, faults that were dropped
//! ```
//!
//! Numbers are little-endian; in payloads they are varints (LEB128), differences zigzagged. Each block starts anew, so that
//! one is good whatever became of those after it: a file that was torn off is read up to its last whole block.

use super::{MOST_BROUGHT, MOST_FAULTS, Trace, TraceEnd, TraceFault, TraceHeader, TraceKind};

const MAGIC: &[u8; 8] = b"UFFTRACE";
const VERSION: u16 = 1;
/// 8 + 2 + 2 + 8 + 32 + 8, and the checksum of these.
const HEADER_LEN: usize = 60 + 4;
const BLOCK_LEN: usize = 12;
const FAULTS: u8 = 1;
const END: u8 = 2;
/// Faults in a block: what a torn write can lose.
pub(super) const FAULTS_PER_BLOCK: usize = 1024;
/// As many bytes as the longest of these can take.
const LONGEST_PAYLOAD: usize = 1 << 16;

const KIND: u8 = 0b11;
const WRITE: u8 = 1 << 2;
const BROUGHT: u8 = 1 << 3;

pub(super) fn encode_header(header: &TraceHeader) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(header.page_size.trailing_zeros() as u16).to_le_bytes());
    bytes.extend_from_slice(&header.image_size.to_le_bytes());
    bytes.extend_from_slice(&header.identity);
    bytes.extend_from_slice(&header.started_ms.to_le_bytes());
    let crc = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

pub(super) fn encode_block(bytes: &mut Vec<u8>, faults: &[TraceFault]) {
    let mut payload = Vec::with_capacity(faults.len() * 12);
    let (mut page, mut time) = (0, 0);
    for fault in faults {
        let kind = match fault.kind {
            TraceKind::Missing => 0,
            TraceKind::Minor => 1,
            TraceKind::WriteProtect => 2,
        };
        let write = if fault.write { WRITE } else { 0 };
        let brought = if fault.pages > 0 { BROUGHT } else { 0 };
        payload.push(kind | write | brought);
        put(&mut payload, zigzag(fault.page.wrapping_sub(page)));
        if fault.pages > 0 {
            put(&mut payload, u64::from(fault.before));
            put(&mut payload, u64::from(fault.pages));
        }
        put(&mut payload, zigzag(fault.time_ns.wrapping_sub(time)));
        put(&mut payload, fault.latency_ns);
        (page, time) = (fault.page, fault.time_ns);
    }
    put_block(bytes, FAULTS, faults.len() as u32, &payload);
}

pub(super) fn encode_end(bytes: &mut Vec<u8>, end: TraceEnd, dropped: u64) {
    let mut payload = vec![u8::from(end == TraceEnd::Full)];
    put(&mut payload, dropped);
    put_block(bytes, END, 0, &payload);
}

fn put_block(bytes: &mut Vec<u8>, kind: u8, count: u32, payload: &[u8]) {
    let mut head = [0; 8];
    let (first, second) = head.split_at_mut(4);
    first.copy_from_slice(&(u32::from(kind) | (payload.len() as u32) << 8).to_le_bytes());
    second.copy_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(&checksum(&head, payload).to_le_bytes());
    bytes.extend_from_slice(payload);
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(head);
    crc.update(payload);
    crc.finalize()
}

pub(super) fn parse(bytes: &[u8]) -> Result<Trace, String> {
    let (header, mut rest) = parse_header(bytes)?;
    let mut trace = Trace { header, faults: Vec::new(), end: TraceEnd::Torn, dropped: 0 };
    while let Some(block) = next_block(rest) {
        rest = block.rest;
        let whole = match block.kind {
            FAULTS => parse_faults(&mut trace, &block),
            END => {
                // Whatever comes behind an end was not written by us.
                parse_end(&mut trace, &block);
                break;
            }
            _ => None,
        };
        if whole.is_none() {
            break;
        }
    }
    // Written as they were answered. Those that were read together stay as they are.
    trace.faults.sort_by_key(|fault| fault.time_ns);
    Ok(trace)
}

fn parse_header(bytes: &[u8]) -> Result<(TraceHeader, &[u8]), String> {
    let Some((head, rest)) = bytes.split_at_checked(HEADER_LEN) else {
        return Err(if bytes.starts_with(MAGIC) || MAGIC.starts_with(bytes) {
            format!("it ends after {} bytes, in the middle of its head", bytes.len())
        } else {
            "it is no recording".to_owned()
        });
    };
    let mut fields = Fields(head);
    if fields.take::<8>() != *MAGIC {
        return Err("it is no recording".to_owned());
    }
    let version = u16::from_le_bytes(fields.take());
    if version != VERSION {
        return Err(format!("it has version {version} of the format, this package reads {VERSION}"));
    }
    let shift = u16::from_le_bytes(fields.take());
    let image_size = u64::from_le_bytes(fields.take());
    let identity = fields.take();
    let started_ms = u64::from_le_bytes(fields.take());
    let said = u32::from_le_bytes(fields.take());
    let crc = crc32fast::hash(head.get(..HEADER_LEN - 4).unwrap_or_default());
    if said != crc || !(12..=30).contains(&shift) {
        return Err("its head is damaged".to_owned());
    }
    Ok((TraceHeader { page_size: 1 << shift, image_size, identity, started_ms }, rest))
}

struct Block<'a> {
    kind: u8,
    count: u32,
    payload: &'a [u8],
    rest: &'a [u8],
}

/// The next block, if all of it is there as it was written.
fn next_block(bytes: &[u8]) -> Option<Block<'_>> {
    let (head, rest) = bytes.split_at_checked(BLOCK_LEN)?;
    let mut fields = Fields(head);
    let word = u32::from_le_bytes(fields.take());
    let count = u32::from_le_bytes(fields.take());
    let said = u32::from_le_bytes(fields.take());
    let len = (word >> 8) as usize;
    let (payload, rest) = rest.split_at_checked(len).filter(|_| len <= LONGEST_PAYLOAD)?;
    let good = checksum(head.get(..8)?, payload) == said;
    good.then_some(Block { kind: word as u8, count, payload, rest })
}

/// All of its faults, or none.
fn parse_faults(trace: &mut Trace, block: &Block<'_>) -> Option<()> {
    let before = trace.faults.len();
    let parsed = try_parse_faults(trace, block);
    if parsed.is_none() {
        trace.faults.truncate(before);
    }
    parsed
}

fn try_parse_faults(trace: &mut Trace, block: &Block<'_>) -> Option<()> {
    let image_pages = trace.image_pages();
    let mut payload = block.payload;
    let (mut page, mut time_ns) = (0_u64, 0_u64);
    for _ in 0..block.count {
        if trace.faults.len() >= MOST_FAULTS {
            return None;
        }
        let (&flags, rest) = payload.split_first()?;
        payload = rest;
        page = page.wrapping_add(unzigzag(take(&mut payload)?));
        let (mut before, mut pages) = (0, 0);
        if flags & BROUGHT != 0 {
            before = u32::try_from(take(&mut payload)?).ok()?;
            pages = u32::try_from(take(&mut payload)?).ok()?;
        }
        time_ns = time_ns.wrapping_add(unzigzag(take(&mut payload)?));
        let latency_ns = take(&mut payload)?;
        let kind = match flags & KIND {
            0 => TraceKind::Missing,
            1 => TraceKind::Minor,
            2 => TraceKind::WriteProtect,
            _ => return None,
        };
        let first = page.checked_sub(u64::from(before))?;
        let inside = page < image_pages && first.saturating_add(u64::from(pages)) <= image_pages;
        if !inside || pages > MOST_BROUGHT || (flags & BROUGHT != 0 && before >= pages) {
            return None;
        }
        let write = flags & WRITE != 0;
        trace.faults.push(TraceFault { time_ns, kind, write, page, before, pages, latency_ns });
    }
    payload.is_empty().then_some(())
}

fn parse_end(trace: &mut Trace, block: &Block<'_>) {
    let mut payload = block.payload;
    let end = match (take(&mut payload), take(&mut payload)) {
        (Some(0), Some(dropped)) => (TraceEnd::Complete, dropped),
        (Some(1), Some(dropped)) => (TraceEnd::Full, dropped),
        _ => return,
    };
    (trace.end, trace.dropped) = end;
}

/// The fields of a head, of which there are as many bytes as are taken.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((field, rest)) = self.0.split_first_chunk::<N>() else { return [0; N] };
        self.0 = rest;
        *field
    }
}

fn zigzag(difference: u64) -> u64 {
    let difference = difference.cast_signed();
    (difference << 1 ^ difference >> 63).cast_unsigned()
}

fn unzigzag(number: u64) -> u64 {
    (number >> 1) ^ (number & 1).wrapping_neg()
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return None;
        }
        number |= bits << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_length_come_back_and_too_long_ones_do_not() {
        let around = (0..64).map(|bit| 1_u64 << bit).flat_map(|number| [number - 1, number, number + 1]);
        for number in around.chain([u64::MAX]) {
            let mut bytes = Vec::new();
            put(&mut bytes, number);
            assert_eq!(take(&mut &bytes[..]), Some(number));
            assert_eq!(take(&mut &bytes[..bytes.len() - 1]), None);
            assert_eq!(unzigzag(zigzag(number)), number);
        }
        assert_eq!(take(&mut &[0xff; 10][..]), None, "more than 64 bits");
        assert_eq!(take(&mut &[0x80; 20][..]), None, "without an end");
    }

    #[test]
    fn a_full_block_fits_into_the_longest_payload() {
        let fault = TraceFault {
            time_ns: u64::MAX,
            kind: TraceKind::WriteProtect,
            write: true,
            page: u64::MAX,
            before: u32::MAX - 1,
            pages: u32::MAX,
            latency_ns: u64::MAX,
        };
        let far = [fault, TraceFault { page: u64::MAX / 2, time_ns: u64::MAX / 2, ..fault }];
        let mut bytes = Vec::new();
        encode_block(&mut bytes, &far.repeat(FAULTS_PER_BLOCK / 2));

        assert!(bytes.len() - BLOCK_LEN <= LONGEST_PAYLOAD, "{}", bytes.len());
    }
}
