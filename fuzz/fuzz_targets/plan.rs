//! What a client says is to be replayed, with a checksum that fits: whatever is taken of it is the same when it is packed again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pager::Replay;

fuzz_target!(|bytes: &[u8]| {
    let words = bytes.len() / 8 * 8;
    let mut sealed = bytes[..words].to_vec();
    sealed.extend_from_slice(&u64::from(crc32fast::hash(&sealed)).to_le_bytes());
    let Ok(replay) = Replay::unpack(&sealed) else { return };
    let packed = replay.pack();
    let again = Replay::unpack(&packed).expect("what was packed is read");
    assert_eq!(again.pack(), packed);
});
