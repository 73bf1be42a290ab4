//! `UFFDIO_API`, on descriptors that the crate has not made ready.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use uffd::{AdoptError, Features, Userfaultfd};
use userfaultfd_sys as sys;

use crate::support::PAGE;
use crate::tables::{Done, EFAULT, EINVAL, Fails, Outcome, Row, row};
use crate::world::{dead, raw};

const API: u64 = sys::UFFD_API;

/// A descriptor that the handshake was not made on.
fn fresh() -> OwnedFd {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | sys::UFFD_USER_MODE_ONLY as i32;
    // SAFETY: takes a number.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }).unwrap();
    // SAFETY: the kernel has just put this descriptor (a small number) into our table; nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn arguments(api: u64, features: u64) -> sys::uffdio_api {
    sys::uffdio_api { api, features, ioctls: 0 }
}

fn shake(fd: &impl AsFd, api: u64, features: u64) -> Outcome {
    raw(fd, &mut arguments(api, features))
}

fn refused_and_zeroed(fd: &OwnedFd, api: u64, features: u64) -> Outcome {
    let mut argument = arguments(api, features);
    argument.ioctls = 7;
    let outcome = raw(fd, &mut argument);
    assert_eq!((argument.api, argument.features, argument.ioctls), (0, 0, 0), "the structure");
    outcome
}

pub(crate) fn rows() -> Vec<Row> {
    let range = sys::uffdio_range { start: 0, len: PAGE };
    vec![
        row("handshake: REGISTER before it", EINVAL, move || {
            raw(&fresh(), &mut sys::uffdio_register { range, mode: 1, ioctls: 0 })
        }),
        row("handshake: COPY before it", EINVAL, || {
            raw(&fresh(), &mut sys::uffdio_copy { dst: 0, src: 0, len: PAGE, mode: 0, copy: 0 })
        }),
        row("handshake: ZEROPAGE before it", EINVAL, move || {
            raw(&fresh(), &mut sys::uffdio_zeropage { range, mode: 0, zeropage: 0 })
        }),
        row("handshake: POISON before it", EINVAL, move || {
            raw(&fresh(), &mut sys::uffdio_poison { range, mode: 0, updated: 0 })
        }),
        row("handshake: CONTINUE before it", EINVAL, move || {
            raw(&fresh(), &mut sys::uffdio_continue { range, mode: 0, mapped: 0 })
        }),
        row("handshake: WRITEPROTECT before it", EINVAL, move || {
            raw(&fresh(), &mut sys::uffdio_writeprotect { range, mode: 0 })
        }),
        row("handshake: MOVE before it", EINVAL, || {
            raw(&fresh(), &mut sys::uffdio_move { dst: 0, src: PAGE, len: PAGE, mode: 0, move_: 0 })
        }),
        row("handshake: UNREGISTER and WAKE before it", EINVAL, move || {
            let (fd, mut range) = (fresh(), range);
            // SAFETY: `range` lives across the call and is the structure of this number.
            let unregister =
                unsafe { libc::ioctl(fd.as_raw_fd(), sys::UFFDIO_UNREGISTER as _, &raw mut range) };
            assert_eq!(Errno::result(unregister), Err(Errno::EINVAL));
            // SAFETY: as above.
            let wake = unsafe { libc::ioctl(fd.as_raw_fd(), sys::UFFDIO_WAKE as _, &raw mut range) };
            Ok(Errno::result(wake).map(drop)?)
        }),
        row("handshake: read before it", EINVAL, || Ok(nix::unistd::read(fresh(), &mut [0; 32]).map(drop)?)),
        row("handshake: poll before it", Done, || {
            let fd = fresh();
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::ZERO)?;
            assert_eq!(fds[0].revents(), Some(PollFlags::POLLERR));
            Ok(())
        }),
        row("handshake: adopting before it", Done, || {
            assert_eq!(Userfaultfd::adopt(fresh()).err(), Some(AdoptError::NoHandshake));
            Ok(())
        }),
        row("handshake: api other than 0xAA", EINVAL, || refused_and_zeroed(&fresh(), API + 1, 0)),
        row("handshake: unknown feature bit", EINVAL, || refused_and_zeroed(&fresh(), API, 1 << 17)),
        row("handshake: unknown feature bit 63", EINVAL, || refused_and_zeroed(&fresh(), API, 1 << 63)),
        row("handshake: after a refused one", Done, || {
            let fd = fresh();
            refused_and_zeroed(&fd, API, 1 << 17).unwrap_err();
            shake(&fd, API, 0)
        }),
        row("handshake: EVENT_FORK without CAP_SYS_PTRACE", Fails(libc::EPERM), || {
            become_nobody();
            shake(&fresh(), API, sys::UFFD_FEATURE_EVENT_FORK)
        }),
        row("handshake: the other events without CAP_SYS_PTRACE", Done, || {
            become_nobody();
            let events = Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
            shake(&fresh(), API, events.bits())
        }),
        row("handshake: NULL pointer", EFAULT, || {
            let (fd, none) = (fresh(), std::ptr::null_mut::<sys::uffdio_api>());
            // SAFETY: nothing is mapped at address 0, so nothing is read or written.
            Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), sys::UFFDIO_API as _, none) })?;
            Ok(())
        }),
        row("handshake: success tells what is supported", Done, || {
            let mut argument = arguments(API, 0);
            raw(&fresh(), &mut argument)?;
            let all = Features::NAMES.iter().map(|(_, feature)| *feature).collect();
            assert!(Features::from_bits_retain(argument.features).contains(all), "{:x}", argument.features);
            assert_eq!(argument.ioctls, 0x8000_0000_0000_0003);
            Ok(())
        }),
        row("handshake: all features together", Done, || {
            shake(&crate::support::uffd(Features::empty()).unwrap(), API, 0).unwrap_err();
            let Some(uffd) = crate::support::uffd(Features::NAMES.iter().map(|(_, bit)| *bit).collect())
            else {
                return crate::tables::skipped("not permitted");
            };
            assert_eq!(uffd.enabled_features().unwrap().bits(), 0x1ffff);
            Ok(())
        }),
        row("handshake: each feature alone", Done, || {
            for (name, feature) in Features::NAMES {
                let fd = crate::support::uffd(*feature).unwrap_or_else(|| panic!("{name}"));
                assert!(fd.enabled_features().unwrap().contains(*feature), "{name}");
            }
            Ok(())
        }),
        row("handshake: second one", EINVAL, || {
            let fd = fresh();
            shake(&fd, API, 0)?;
            refused_and_zeroed(&fd, API, 0)
        }),
        row("handshake: on a uffd of a FORK event", EINVAL, || {
            shake(&dead().expect("made before the first row"), API, 0)
        }),
    ]
}

/// This thread gives up all rights: as far as the kernel is concerned, credentials are a thread's.
fn become_nobody() {
    const NOBODY: u32 = 65_534;
    // SAFETY: takes numbers. By number, because the libc wrapper changes all threads of the process.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
