//! REGISTER tells which ioctls the range can take, for each combination of modes.

use uffd::{Features, Ioctls, Modes, UffdError};

use crate::memory::{Area, Memory, uffd};

fn case(memory: Memory) {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let area = Area::usual(memory);
    for bits in 0..8 {
        let modes = Modes::from_bits_retain(bits);
        let refused = modes.is_empty() || (modes.contains(Modes::MINOR) && memory == Memory::Anon);
        match area.try_register(uffd, modes) {
            Err(UffdError::System { errno, .. }) => {
                assert_eq!((refused, errno as i32), (true, libc::EINVAL), "{modes:?}");
            }
            Err(error) => panic!("{modes:?}: {error}"),
            Ok(ioctls) => {
                assert!(!refused, "{modes:?} was accepted");
                assert_eq!(ioctls, expected(memory, modes), "{modes:?}");
                uffd.unregister(area.start(), area.len()).unwrap();
            }
        }
        assert!(!uffd.has_registrations());
    }
}

fn expected(memory: Memory, modes: Modes) -> Ioctls {
    let mut ioctls = Ioctls::WAKE | Ioctls::COPY | Ioctls::POISON;
    ioctls.set(Ioctls::ZEROPAGE | Ioctls::MOVE, !memory.is_huge());
    ioctls.set(Ioctls::WRITEPROTECT, modes.contains(Modes::WRITE_PROTECT));
    ioctls.set(Ioctls::CONTINUE, modes.contains(Modes::MINOR));
    ioctls
}

cases!(case; all);
