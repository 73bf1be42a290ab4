//! What is said before memory of this very process ends the program: SIGBUS and abort do so without a word about why.

use crate::address_map::AddressMap;
use crate::error::PagerError;

/// Touching what is missing is a SIGBUS from now on.
pub(crate) fn cannot_be_served(map: &AddressMap, error: &PagerError) {
    let regions: Vec<String> =
        map.regions().map(|region| format!("{:#x}+{:#x}", region.address, region.len)).collect();
    say(&format!("memory at {} of this process cannot be served any more: {error}", regions.join(", ")));
}

/// A thread waits for bytes that only it could bring. Nothing could be given to it that would be true, so the program ends.
pub(crate) fn deadlock(address: u64) -> ! {
    say(&format!(
        "deadlock: the JavaScript thread that the source of this memory runs on has touched a page at \
         {address:#x} that is not there yet, and would wait for itself for ever. Use mapping.read(), touch the memory on \
         another thread, or give the source a thread of its own (workerSource)."
    ));
    std::process::abort();
}

/// In one piece, whatever else is written at the same time.
fn say(text: &str) {
    let line = format!("userfaultfd: {text}\n");
    eprint!("{line}");
}
