//! Creating: which way, with which rights, with which features.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::unistd::Uid;
use uffd::{
    Backend, CreateError, CreateOptions, Factory, Faults, Features, Ioctls, MappingKind, Modes, Userfaultfd,
};

use support::{elsewhere, fault, finish, pages, register, uffd};

const NOBODY: u32 = 65_534;

/// Serves one real fault, so that what was created is known to work.
fn serves_a_fault(uffd: &Userfaultfd) {
    let mapping = std::sync::Arc::new(pages(1, MappingKind::Private));
    register(uffd, &mapping, Modes::MISSING);
    let reader = std::sync::Arc::clone(&mapping);
    let byte = elsewhere(move || {
        let mut byte = [9];
        reader.read(0, &mut byte).unwrap();
        byte[0]
    });
    let address = fault(uffd).address;
    uffd.zero(address, 4096, true).unwrap();
    assert_eq!(finish(&byte), 0);
}

/// Whether this process may create without restriction, said where it may not.
fn privileged() -> bool {
    let root = Uid::effective().is_root();
    if !root {
        println!("skipped: needs root");
    }
    root
}

/// Runs `act` on a thread that is another user: credentials belong to threads, as far as the kernel is concerned.
fn as_nobody<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    finish(&elsewhere(move || {
        // SAFETY: takes numbers. By number, because the libc wrapper changes all threads of the process.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
        assert_eq!(result, 0, "this thread must be able to become another user");
        act()
    }))
}

#[test]
fn the_device_is_preferred_and_what_it_makes_serves_faults() {
    let factory = Factory::open();
    if factory.backend() != Backend::Device {
        println!("skipped: /dev/userfaultfd cannot be opened ({:?})", factory.device_error());
        return;
    }

    let uffd = factory.create(&CreateOptions::default()).unwrap();

    let origin = uffd.origin().unwrap();
    assert_eq!((origin.backend, origin.user_mode_only), (Backend::Device, false));
    serves_a_fault(&uffd);
}

#[test]
fn the_system_call_makes_one_that_serves_faults() {
    let uffd = Factory::syscall_only().create(&CreateOptions::default()).unwrap();

    assert_eq!(uffd.origin().unwrap().backend, Backend::Syscall);
    serves_a_fault(&uffd);
}

#[test]
fn a_device_that_is_none_falls_back_to_the_system_call() {
    let not_the_device = OwnedFd::from(File::open("/dev/null").unwrap());

    let uffd = Factory::from_device(not_the_device).create(&CreateOptions::default()).unwrap();

    assert_eq!(uffd.origin().unwrap().backend, Backend::Syscall);
}

#[test]
fn a_device_opened_before_privileges_were_dropped_still_creates() {
    let factory = Factory::open();
    if !privileged() || factory.backend() != Backend::Device {
        println!("skipped: needs the device");
        return;
    }

    let (kept, fresh) = as_nobody(move || {
        let kept = factory
            .try_clone()
            .unwrap()
            .create(&CreateOptions { faults: Faults::All, ..CreateOptions::default() });
        (kept.map(|uffd| uffd.origin().unwrap()), Factory::open().device_error())
    });

    assert!(!kept.unwrap().user_mode_only);
    assert_eq!(fresh, Some(nix::errno::Errno::EACCES));
}

#[test]
fn without_any_right_all_faults_are_refused_with_the_reason_and_user_mode_is_given() {
    if !privileged()
        || std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap().trim() != "0"
    {
        println!("skipped: needs root, and vm.unprivileged_userfaultfd=0");
        return;
    }

    let (all, permitted) = as_nobody(|| {
        let all = Factory::open().create(&CreateOptions { faults: Faults::All, ..CreateOptions::default() });
        let permitted = Factory::open().create(&CreateOptions::default()).map(|uffd| uffd.origin().unwrap());
        (all.err(), permitted)
    });

    assert_eq!(all, Some(CreateError::NotPermitted { device: Some(nix::errno::Errno::EACCES) }));
    assert!(permitted.unwrap().user_mode_only);
}

#[test]
fn event_fork_without_the_right_is_an_error_when_required_and_left_out_when_preferred() {
    if !privileged() {
        return;
    }
    let fork = Features::EVENT_FORK;

    let (required, preferred) = as_nobody(move || {
        let required = CreateOptions { require: fork, faults: Faults::User, ..CreateOptions::default() };
        let prefer = fork | Features::EVENT_REMOVE;
        let preferred = CreateOptions { prefer, faults: Faults::User, ..CreateOptions::default() };
        (
            Factory::open().create(&required).err(),
            Factory::open().create(&preferred).unwrap().enabled_features(),
        )
    });

    assert_eq!(required, Some(CreateError::ForkNotPermitted));
    assert_eq!(preferred, Some(Features::EVENT_REMOVE));
}

#[test]
fn features_the_kernel_does_not_have_are_named_when_required_and_left_out_when_preferred() {
    let unknown = Features::from_bits_retain(1 << 60);
    let factory = Factory::open();

    let required = factory.create(&CreateOptions { require: unknown, ..CreateOptions::default() });
    let preferred = factory.create(&CreateOptions { prefer: unknown, ..CreateOptions::default() });

    assert_eq!(required.err(), Some(CreateError::Unsupported { missing: unknown }));
    assert_eq!(preferred.unwrap().enabled_features(), Some(Features::empty()));
}

#[test]
fn what_is_enabled_is_told_apart_from_what_is_supported() {
    let Some(uffd) = uffd(Features::THREAD_ID) else { return };

    assert_eq!(uffd.enabled_features(), Some(Features::THREAD_ID));
    assert!(uffd.supported_features().unwrap().contains(Features::THREAD_ID | Features::EVENT_REMOVE));
}

#[test]
fn wp_async_is_told_to_bring_wp_unpopulated() {
    if !Factory::open().probe().unwrap().features.contains(Features::WP_ASYNC) {
        println!("skipped: this kernel has no wp-async");
        return;
    }
    let Some(uffd) = uffd(Features::WP_ASYNC) else { return };

    // What /proc says of the same descriptor.
    let adopted = Userfaultfd::adopt(uffd.as_fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!(uffd.enabled_features(), adopted.enabled_features());
}

#[test]
fn a_probe_tells_what_the_kernel_has() {
    let supported = Factory::open().probe().unwrap();

    assert!(supported.features.contains(Features::EVENT_REMOVE));
    assert_eq!(supported.ioctls, Ioctls::REGISTER | Ioctls::UNREGISTER | Ioctls::API);
}

#[test]
fn flags_are_on_by_default_and_can_be_left_out() {
    let factory = Factory::open();
    let flags = |uffd: &Userfaultfd| {
        let status = OFlag::from_bits_retain(fcntl(uffd.as_fd(), FcntlArg::F_GETFL).unwrap());
        let descriptor = FdFlag::from_bits_retain(fcntl(uffd.as_fd(), FcntlArg::F_GETFD).unwrap());
        (status.contains(OFlag::O_NONBLOCK), descriptor.contains(FdFlag::FD_CLOEXEC))
    };

    let usual = factory.create(&CreateOptions::default()).unwrap();
    let plain = CreateOptions { non_blocking: false, close_on_exec: false, ..CreateOptions::default() };
    let plain = factory.create(&plain).unwrap();

    assert_eq!(flags(&usual), (true, true));
    assert_eq!(flags(&plain), (false, false));
}

#[test]
fn a_descriptor_that_is_handed_out_stays_open() {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let raw = uffd.as_fd().as_raw_fd();

    let fd = uffd.into_owned_fd();

    assert_eq!(fd.as_raw_fd(), raw);
    assert!(fcntl(&fd, FcntlArg::F_GETFD).is_ok());
}
