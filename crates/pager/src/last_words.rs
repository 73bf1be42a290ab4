//! What is said before memory of this very process ends the program: SIGBUS and abort do so without a word about why.

use std::fmt::{Arguments, Write};

use crate::address_map::AddressMap;
use crate::error::PagerError;

/// Touching what is missing is a SIGBUS from now on.
pub(crate) fn cannot_be_served(map: &AddressMap, error: &PagerError) {
    let regions: Vec<String> =
        map.regions().map(|region| format!("{:#x}+{:#x}", region.address, region.len)).collect();
    say(format_args!("memory at {} of this process cannot be served any more: {error}", regions.join(", ")));
}

/// A thread waits for bytes that only it could bring. Nothing could be given to it that would be true, so the program ends.
pub(crate) fn deadlock(address: u64) -> ! {
    say(format_args!(
        "deadlock: the JavaScript thread that the source of this memory runs on has touched a page at \
         {address:#x} that is not there yet, and would wait for itself for ever. Use mapping.read(), touch the memory on \
         another thread, or give the source a thread of its own (workerSource)."
    ));
    std::process::abort();
}

/// A thread waits for memory that is held, and only it could let that go on.
pub(crate) fn held_for_ever(address: u64) -> ! {
    say(format_args!(
        "deadlock: the JavaScript thread that serves this memory has touched a page at {address:#x} while the session is held, \
         and only it could resume it: it would wait for itself for ever. Touch the memory on another thread, or limit the hold \
         (`holdTimeout`)."
    ));
    std::process::abort();
}

/// A line of bounded length that needs no allocation, because whoever speaks may be the one who must not wait for another
/// thread's fork(3).
struct Line {
    bytes: [u8; 1024],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        // The last byte is the end of the line.
        let room = self.bytes.len() - 1 - self.len;
        let taken = text.len().min(room);
        if let (Some(place), Some(text)) =
            (self.bytes.get_mut(self.len..self.len + taken), text.as_bytes().get(..taken))
        {
            place.copy_from_slice(text);
            self.len += taken;
        }
        Ok(())
    }
}

/// Writes to descriptor 2, in one piece, whatever else is written at the same time.
pub(crate) fn say(text: Arguments<'_>) {
    let mut line = Line { bytes: [0; 1024], len: 0 };
    // It takes whatever fits and never fails.
    let _ = write!(line, "userfaultfd: {text}");
    if let Some(end) = line.bytes.get_mut(line.len) {
        *end = b'\n';
    }
    // SAFETY: the bytes live across the call, and so many are there. Where nobody listens nothing can be told.
    unsafe { libc::write(2, line.bytes.as_ptr().cast(), line.len + 1) };
}
