//! Commands that look at the bytes: `hash`, `compare`, `zeros`, `read`, `write`, `probe`. Pages are copied one
//! by one into this process's own memory before anything is computed from them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use sha2::{Digest, Sha256};

use crate::failure::Failure;
use crate::json::Object;
use crate::memory::Memory;
use crate::page_set::PageSet;
use crate::text;
use crate::touch::nanoseconds;

/// Longest `read`, so that an answer stays a line one can look at.
const MOST_READ: usize = 65536;

/// `hash`: SHA-256 of all regions in image order, without the pages in `left_out`.
pub(crate) fn hash(memory: &Memory, left_out: Option<&PageSet>) -> Object {
    let start = Instant::now();
    let mut digest = Sha256::new();
    let mut page_bytes = vec![0; memory.page_size()];
    let mut bytes = 0;
    for (number, page) in memory.numbered_pages() {
        if left_out.is_some_and(|set| set.contains(number)) {
            continue;
        }
        page.memory.load(&mut page_bytes);
        digest.update(&page_bytes);
        bytes += page_bytes.len() as u64;
    }
    Object::new()
        .string("command", "hash")
        .string("sha256", &text::to_hex(&digest.finalize()))
        .number("bytes", bytes)
        .number("ns", nanoseconds(start.elapsed()))
}

/// `compare`: every page that is not in `discarded` against the file, at its image offset.
///
/// # Errors
/// A file that cannot be opened or read, or that ends before a page does.
pub(crate) fn compare(memory: &Memory, discarded: &PageSet, path: &str) -> Result<Object, Failure> {
    let file = File::open(path).map_err(|error| Failure::io(format!("open of {path}"), &error))?;
    let mut actual = vec![0; memory.page_size()];
    let mut expected = vec![0; memory.page_size()];
    let mut tally = Tally::new();
    for (_, page) in memory.numbered_pages().filter(|(number, _)| !discarded.contains(*number)) {
        file.read_exact_at(&mut expected, page.offset)
            .map_err(|error| Failure::io(format!("read of {path} at offset {:#x}", page.offset), &error))?;
        page.memory.load(&mut actual);
        // Many times as fast as looking for the first that differs.
        let bad =
            if actual == expected { None } else { actual.iter().zip(&expected).position(|(a, b)| a != b) };
        tally.add(page.offset, bad);
    }
    Ok(tally.answer("compare", "different"))
}

/// `zeros`: whether every byte of every page in `discarded` is zero.
pub(crate) fn zeros(memory: &Memory, discarded: &PageSet) -> Object {
    let mut bytes = vec![0; memory.page_size()];
    let mut tally = Tally::new();
    for (_, page) in memory.numbered_pages().filter(|(number, _)| discarded.contains(*number)) {
        page.memory.load(&mut bytes);
        tally.add(page.offset, bytes.iter().position(|byte| *byte != 0));
    }
    tally.answer("zeros", "nonzero")
}

/// `read OFFSET LEN`.
///
/// # Errors
/// Bytes that no region holds, or more of them than an answer carries.
pub(crate) fn read(memory: &Memory, offset: u64, len: usize) -> Result<Object, Failure> {
    if len > MOST_READ {
        return Err(Failure::new(format!("LEN: expected at most {MOST_READ}, got {len}")));
    }
    let mut bytes = Vec::with_capacity(len);
    for chunk in memory.chunks(offset, len)? {
        let mut part = vec![0; chunk.len()];
        chunk.load(&mut part);
        bytes.append(&mut part);
    }
    Ok(Object::new().string("command", "read").string("hex", &text::to_hex(&bytes)))
}

/// `write OFFSET HEX`.
///
/// # Errors
/// Bytes that no region holds; nothing is stored then.
pub(crate) fn write(memory: &Memory, offset: u64, bytes: &[u8]) -> Result<Object, Failure> {
    let mut rest = bytes;
    for chunk in memory.chunks(offset, bytes.len())? {
        let (part, behind) = rest.split_at_checked(chunk.len()).unwrap_or((rest, &[]));
        chunk.store(part);
        rest = behind;
    }
    Ok(Object::new().string("command", "write").number("bytes", bytes.len() as u64))
}

/// `probe OFFSET`: what the kernel finds when it loads from the page that holds the offset.
///
/// # Errors
/// An offset that no region holds, or a pipe that fails.
pub(crate) fn probe(memory: &Memory, offset: u64) -> Result<Object, Failure> {
    let page_start = offset - offset % memory.page_size() as u64;
    let chunks = memory.chunks(page_start, memory.page_size())?;
    let page =
        chunks.first().ok_or_else(|| Failure::new(format!("no region holds image offset {offset:#x}")))?;
    let answer = Object::new().string("command", "probe");
    Ok(match page.probe()? {
        Some(bytes) => answer.string("result", "ok").string("hex", &text::to_hex(&bytes)),
        None => answer.string("result", "efault"),
    })
}

/// Pages looked at, and the bad ones among them.
struct Tally {
    pages: u64,
    bad: u64,
    first_bad: Option<u64>,
}

impl Tally {
    fn new() -> Self {
        Self { pages: 0, bad: 0, first_bad: None }
    }

    /// Counts a page at image offset `offset`; `bad` is the position of its first wrong byte.
    fn add(&mut self, offset: u64, bad: Option<usize>) {
        self.pages += 1;
        if let Some(position) = bad {
            self.bad += 1;
            self.first_bad.get_or_insert(offset + position as u64);
        }
    }

    fn answer(self, command: &str, bad_name: &str) -> Object {
        Object::new()
            .string("command", command)
            .number("pages", self.pages)
            .number(bad_name, self.bad)
            .number_or_null("first_bad", self.first_bad)
    }
}
