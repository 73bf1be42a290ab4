//! Handshakes of every Firecracker version, and what becomes of them when somebody else writes them: a deterministic
//! mutator that knows the structure (fields, numbers, regions) and one that knows bytes only.
#![allow(unreachable_pub, reason = "a module of a test program is its own crate's")]
#![allow(dead_code, reason = "each test program uses a part of it")]

/// The same numbers every time: xorshift64*, seeded.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// 0 to `end - 1`; 0 where there is nothing to choose from.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() >> 32) as usize % end.max(1)
    }

    pub fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn of<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }
}

const HUGE: u64 = 2 << 20;

/// One region as text: what is not a number in there was put there by a mutation.
#[derive(Clone)]
struct Fields(Vec<(String, String)>);

/// A message, and whether anything in it is other than Firecracker would send.
pub struct Message {
    pub bytes: Vec<u8>,
    pub mutated: bool,
}

/// Where the memory that a message speaks of can be.
#[derive(Clone, Copy)]
pub struct Bounds {
    pub address: u64,
    /// Bytes of memory, and of the source.
    pub len: u64,
    pub page_size: u64,
}

impl Bounds {
    /// Somewhere, of either size of pages.
    pub fn anywhere(random: &mut Random) -> Self {
        let page_size = if random.one_in(4) { HUGE } else { 4096 };
        let address = (0x7000_0000 + random.below(1 << 20) as u64) * HUGE;
        Self { address, len: (1 + random.below(64) as u64) * page_size, page_size }
    }
}

/// The next message: one in eight as Firecracker sends it, the others mutated.
pub fn message(random: &mut Random, bounds: Bounds) -> Message {
    let mut regions = handshake(random, bounds);
    let mutated = !random.one_in(8);
    if mutated {
        for _ in 0..random.below(4) {
            mutate_structure(random, &mut regions, bounds);
        }
    }
    let mut bytes = text(&regions).into_bytes();
    if mutated && random.one_in(2) {
        for _ in 0..1 + random.below(3) {
            mutate_bytes(random, &mut bytes);
        }
    }
    if mutated && random.one_in(4000) {
        // About as long as a message may be.
        let pad = (64 << 10) - 200 + random.below(400);
        let at = random.below(bytes.len() + 1);
        bytes.splice(at..at, std::iter::repeat_n(b' ', pad));
    }
    Message { bytes, mutated }
}

/// The message cut into pieces, as a stream may deliver it: the lengths at which something has arrived.
pub fn pieces(random: &mut Random, len: usize) -> Vec<usize> {
    let mut ends: Vec<usize> = (0..random.below(4)).map(|_| random.below(len + 1)).collect();
    ends.push(len);
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// What a Firecracker of some version would send about this memory.
fn handshake(random: &mut Random, bounds: Bounds) -> Vec<Fields> {
    let pages = bounds.len / bounds.page_size;
    let version = if bounds.page_size == 4096 { random.below(3) } else { 1 + random.below(2) };
    let count = 1 + random.below(pages.min(4) as usize) as u64;
    let gap = if random.one_in(2) { bounds.page_size } else { 0 };
    let mut regions = Vec::new();
    let mut first = 0;
    for index in 0..count {
        let last = if index + 1 == count { pages } else { first + (pages - first) / (count - index) };
        let mut fields = vec![
            ("base_host_virt_addr", bounds.address + index * gap + first * bounds.page_size),
            ("size", (last - first) * bounds.page_size),
            ("offset", first * bounds.page_size),
        ];
        if version == 2 {
            fields.push(("page_size", bounds.page_size));
        }
        if version >= 1 {
            fields.push(("page_size_kib", bounds.page_size));
        }
        regions.push(Fields(
            fields.into_iter().map(|(name, value)| (name.to_owned(), value.to_string())).collect(),
        ));
        first = last;
    }
    if random.one_in(8) {
        regions.reverse();
    }
    regions
}

fn text(regions: &[Fields]) -> String {
    let region = |Fields(fields): &Fields| {
        let fields: Vec<String> = fields.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
        format!("{{{}}}", fields.join(","))
    };
    format!("[{}]", regions.iter().map(region).collect::<Vec<_>>().join(","))
}

fn mutate_structure(random: &mut Random, regions: &mut Vec<Fields>, bounds: Bounds) {
    if regions.is_empty() {
        return;
    }
    let (one, other) = (random.below(regions.len()), random.below(regions.len()));
    match random.below(9) {
        0 => drop(regions.remove(one)),
        1 => regions.push(regions[other].clone()),
        2 => regions.swap(one, other),
        _ if regions[one].0.is_empty() => {}
        3 => {
            let fields = &mut regions[one].0;
            let field = random.below(fields.len());
            fields.remove(field);
        }
        4 => {
            let names = ["gpa_start", "is_guest_memfd", "size", "page_size", "page_size_kib", "", "\\u0000"];
            let name = random.of(&names).to_owned();
            let value = value(random, bounds);
            regions[one].0.push((name, value));
        }
        5 => {
            // A number of another region: overlaps, or the same bytes of the source twice.
            let field = random.below(regions[one].0.len());
            if let Some((_, value)) = regions[other].0.get(field).cloned() {
                regions[one].0[field].1 = value;
            }
        }
        6 => {
            // Near the truth: a page more or less, or no whole one.
            let field = random.below(regions[one].0.len());
            let value = &mut regions[one].0[field].1;
            if let Ok(number) = value.parse::<u64>() {
                let by = [1, 8, 512, 4096, bounds.page_size, bounds.len][random.below(6)];
                let near = if random.one_in(2) { number.wrapping_add(by) } else { number.wrapping_sub(by) };
                *value = near.to_string();
            }
        }
        _ => {
            let field = random.below(regions[one].0.len());
            regions[one].0[field].1 = value(random, bounds);
        }
    }
}

/// A value that is at a limit, or no number at all.
fn value(random: &mut Random, bounds: Bounds) -> String {
    let numbers = [
        0,
        1,
        4095,
        4096,
        4097,
        bounds.len,
        bounds.len + bounds.page_size,
        HUGE,
        1 << 30,
        u64::from(u32::MAX) + 1,
        (1 << 47) - 4096,
        1 << 47,
        (1 << 56) - bounds.page_size,
        1 << 56,
        (1 << 63) - 1,
        1 << 63,
        u64::MAX - 4095,
        u64::MAX - HUGE + 1,
        u64::MAX,
    ];
    let words = [
        "-1",
        "-0",
        "1.5",
        "4096.0",
        "1e3",
        "1e999",
        "18446744073709551616",
        "null",
        "true",
        "\"4096\"",
        "[]",
        "{}",
        "[[[[[[[[]]]]]]]]",
        "0x1000",
        "004096",
        "NaN",
        "",
        "\"\\ud800\"",
        "{\"a\":[1,{\"b\":null}]}",
    ];
    if random.one_in(3) {
        random.of(&words).to_owned()
    } else {
        numbers[random.below(numbers.len())].to_string()
    }
}

fn mutate_bytes(random: &mut Random, bytes: &mut Vec<u8>) {
    let at = random.below(bytes.len() + 1);
    let end = (at + random.below(24)).min(bytes.len());
    match random.below(8) {
        0 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        1 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = random.next() as u8;
            }
        }
        2 => bytes.insert(at, b"\0[]{}\",:0-\\ \n\xff\xc3e"[random.below(16)]),
        3 => drop(bytes.drain(at..end)),
        4 => {
            let part = bytes[at..end].to_vec();
            let to = random.below(bytes.len() + 1);
            bytes.splice(to..to, part);
        }
        5 => bytes.truncate(at),
        6 => bytes.extend_from_slice(b" [{\"next\":1}]\0\xff"),
        _ => drop(bytes.splice(0..0, b"\xef\xbb\xbf \n\0GET".iter().copied().take(random.below(8)))),
    }
}
