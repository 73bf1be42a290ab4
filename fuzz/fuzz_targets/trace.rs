//! Bytes as a file may hold them: whatever is read of them can be written and read again, and its working set is bounded.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pager::Trace;

fuzz_target!(|bytes: &[u8]| {
    let Ok(trace) = Trace::parse(bytes) else { return };
    let pages = trace.header.image_size.div_ceil(u64::from(trace.header.page_size));
    assert!(trace.working_set().iter().all(|range| range.end <= pages));
    let again = Trace::parse(&trace.encode()).expect("what was written is read");
    assert_eq!(again, trace);
});
