//! Bytes as a peer may send them: the parser comes to the same end in whatever pieces they arrive.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pager::{AddressMap, parse_handshake};

/// Bytes of the source.
const SOURCE: u64 = 1 << 30;

fuzz_target!(|bytes: &[u8]| {
    let whole = parse_handshake(bytes, 4096);
    for end in [bytes.len() / 2, bytes.len().saturating_sub(1)] {
        match (parse_handshake(&bytes[..end], 4096), &whole) {
            (Ok(None), _) => {}
            (Ok(Some(part)), Ok(Some(whole))) => assert_eq!(part, *whole),
            // `[22` is wrong at once; of `[22e` the reader wants to see the end of the number first.
            (Err(_), Err(_) | Ok(None)) => {}
            (part, whole) => panic!("{end} bytes: {part:?}, all: {whole:?}"),
        }
    }
    if let Ok(Some(handshake)) = whole
        && let Ok(map) = AddressMap::new(&handshake.regions, handshake.page_size, SOURCE)
    {
        assert!(map.pages() as u64 * handshake.page_size <= SOURCE);
        assert!(map.regions().all(|region| region.len > 0 && region.address + region.len <= 1 << 56));
    }
});
