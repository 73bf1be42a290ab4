//! UFFDIO_API, of descriptors from the system call and from the device.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use uffd::{AdoptError, Backend, CreateError, CreateOptions, Factory, Features, Ioctls, Userfaultfd};
use userfaultfd_sys as sys;

/// A feature that no kernel has.
const WRONG: u64 = 1 << 63;

/// A descriptor without a handshake, which the factory never hands out.
fn new_fd(factory: &Factory) -> Option<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let fd = match factory.device() {
        // SAFETY: the device takes the flags by value.
        Some(device) => unsafe {
            libc::ioctl(device.as_raw_fd(), sys::USERFAULTFD_IOC_NEW.into(), flags).into()
        },
        // SAFETY: takes one number.
        None => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) },
    };
    match Errno::result(fd) {
        // SAFETY: the kernel has just put this descriptor into our table; nobody else knows of it.
        Ok(fd) => Some(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
        Err(errno) => {
            println!("skipped: no userfaultfd: {errno}");
            None
        }
    }
}

fn handshake(fd: i32, api: u64, features: u64) -> (Result<i32, Errno>, sys::uffdio_api) {
    let mut arg = sys::uffdio_api { api, features, ioctls: 0 };
    // SAFETY: `arg` lives across the call and has the size that the number encodes.
    let result = unsafe { libc::ioctl(fd, sys::UFFDIO_API as _, &raw mut arg) };
    (Errno::result(result), arg)
}

fn refused(fd: i32, api: u64, features: u64) {
    let (result, arg) = handshake(fd, api, features);
    assert_eq!(result, Err(Errno::EINVAL));
    assert_eq!((arg.api, arg.features, arg.ioctls), (0, 0, 0), "what was refused is zeroed");
}

fn case(factory: Factory, backend: Backend) {
    let Some(fd) = new_fd(&factory) else { return };
    refused(fd.as_raw_fd(), 0xab, 0);
    refused(fd.as_raw_fd(), sys::UFFD_API, WRONG);
    let unready = Userfaultfd::adopt(fd.try_clone().unwrap()).unwrap_err();
    let (accepted, answer) = handshake(fd.as_raw_fd(), sys::UFFD_API, 0);
    let ready = Userfaultfd::adopt(fd.try_clone().unwrap());
    refused(fd.as_raw_fd(), sys::UFFD_API, 0);

    assert_eq!(unready, AdoptError::NoHandshake);
    assert_eq!(accepted, Ok(0));
    assert_eq!(ready.unwrap().enabled_features(), Some(Features::empty()));

    let wrong = Features::from_bits_retain(WRONG);
    let error = factory.create(&CreateOptions { require: wrong, ..CreateOptions::default() }).unwrap_err();
    let uffd = factory.create(&CreateOptions { prefer: wrong, ..CreateOptions::default() }).unwrap();
    refused(uffd.as_upstream().as_raw_fd(), sys::UFFD_API, 0);

    assert_eq!(error, CreateError::Unsupported { missing: wrong });
    assert_eq!(uffd.origin().unwrap().backend, backend);
    assert_eq!(uffd.enabled_features(), Some(Features::empty()));
    let supported = factory.probe().unwrap();
    assert_eq!(supported.features, Features::from_bits_retain(answer.features));
    assert_eq!(supported.ioctls, Ioctls::API | Ioctls::REGISTER | Ioctls::UNREGISTER);
}

case!(syscall, 0, || case(Factory::syscall_only(), Backend::Syscall));

case!(device, 0, || {
    let factory = Factory::open();
    match factory.device_error() {
        None => case(factory, Backend::Device),
        Some(errno) => println!("skipped: no /dev/userfaultfd: {errno}"),
    }
});
