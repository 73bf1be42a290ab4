//! bytecodealliance/userfaultfd-rs.

use std::sync::Arc;

use uffd::{CopyOptions, EventBuffer, FaultKind, Features, Ioctls, MappingKind, Modes, Userfaultfd};
use userfaultfd_sys as sys;

use crate::reader;
use crate::support::{DEADLINE, PAGE, elsewhere, fault, finish, pages, registered, uffd};

const M: Modes = Modes::MISSING;

#[test]
fn a_read_gives_nothing_before_the_fault_and_then_the_fault() {
    let Some((uffd, mapping)) = registered(1, M, Features::empty()) else { return };
    let mapping = Arc::new(mapping);

    assert_eq!(uffd.read_events(&mut EventBuffer::new(1)), Ok(0));
    let byte = reader(&mapping, 0);

    assert_eq!(fault(&uffd).address, mapping.address());
    uffd.zero(mapping.address(), PAGE, true).unwrap();
    assert_eq!(finish(&byte), 0);
    assert_eq!(uffd.read_events(&mut EventBuffer::new(1)), Ok(0));
}

/// A thread that writes 1, and then 2, waits for its page first and then for its protection to be taken off.
#[test]
fn a_page_protected_before_its_waiter_is_woken_stops_the_same_write_again() {
    let Some(uffd) = uffd(Features::PAGEFAULT_FLAG_WP) else { return };
    let mapping = Arc::new(pages(1, MappingKind::Private));
    let (start, modes) = (mapping.address(), M | Modes::WRITE_PROTECT);
    // SAFETY: no reference to the memory exists.
    let ioctls = unsafe { uffd.register(start, PAGE, modes) }.unwrap();
    assert!(ioctls.contains(Ioctls::WRITEPROTECT), "{ioctls}");
    let writer = Arc::clone(&mapping);
    let written = elsewhere(move || [1, 2].map(|byte| writer.write(0, &[byte]).unwrap()));

    let missing = fault(&uffd);
    uffd.zero(start, PAGE, false).unwrap();
    assert_eq!(finish(&reader(&mapping, 0)), 0, "the page is there, and its waiter sleeps on");
    uffd.write_protect(start, PAGE, true, false).unwrap();
    uffd.wake(start, PAGE).unwrap();
    let protected = fault(&uffd);
    assert_eq!(finish(&reader(&mapping, 0)), 0);
    uffd.write_protect(start, PAGE, false, true).unwrap();
    finish(&written);

    assert_eq!((missing.kind, missing.address), (FaultKind::Missing, start));
    assert_eq!((protected.kind, protected.address), (FaultKind::WriteProtect, start));
    assert_eq!(finish(&reader(&mapping, 0)), 2);
}

/// Answers each fault by a page of another letter, until all pages are there.
fn serve_letters(uffd: &Userfaultfd, count: u8) {
    for letter in b'A'..b'A' + count {
        let message = fault(uffd);
        let page = [letter; PAGE as usize];
        // SAFETY: `page` lives across the call.
        unsafe { uffd.copy(message.address, page.as_ptr(), page.len(), CopyOptions::default()) }.unwrap();
    }
}

/// The example of userfaultfd(2): a thread walks over three pages in steps of 1024 bytes.
#[test]
fn the_example_of_the_manual_page_reads_a_letter_per_page() {
    const PAGES: u8 = 3;
    let Some((uffd, mapping)) = registered(PAGES.into(), M, Features::empty()) else { return };
    let served = elsewhere(move || serve_letters(&uffd, PAGES));
    let walked = elsewhere(move || {
        let read = |offset| {
            let mut byte = [0];
            mapping.read(offset, &mut byte).unwrap();
            byte[0]
        };
        (0xf..mapping.len()).step_by(1024).map(read).collect::<Vec<u8>>()
    });

    let letters = walked.recv_timeout(DEADLINE).unwrap();

    assert_eq!(String::from_utf8(letters).unwrap(), "AAAABBBBCCCC");
    finish(&served);
}

/// One after the other, as linux/userfaultfd.h has them.
#[test]
fn constants_are_those_of_the_kernels_header() {
    let modes = [Modes::MISSING, Modes::WRITE_PROTECT, Modes::MINOR].map(|mode| mode.bits());
    let asks = [sys::UFFDIO_COPY_MODE_DONTWAKE, sys::UFFDIO_COPY_MODE_WP];
    let protects = [sys::UFFDIO_WRITEPROTECT_MODE_WP, sys::UFFDIO_WRITEPROTECT_MODE_DONTWAKE];
    let moves = [sys::UFFDIO_MOVE_MODE_DONTWAKE, sys::UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES];
    let continues = [sys::UFFDIO_CONTINUE_MODE_DONTWAKE, sys::UFFDIO_CONTINUE_MODE_WP];
    let faults =
        [sys::UFFD_PAGEFAULT_FLAG_WRITE, sys::UFFD_PAGEFAULT_FLAG_WP, sys::UFFD_PAGEFAULT_FLAG_MINOR];
    let events = [
        sys::UFFD_EVENT_PAGEFAULT,
        sys::UFFD_EVENT_FORK,
        sys::UFFD_EVENT_REMAP,
        sys::UFFD_EVENT_REMOVE,
        sys::UFFD_EVENT_UNMAP,
    ];
    let ioctls = [
        sys::UFFDIO_API,
        sys::UFFDIO_REGISTER,
        sys::UFFDIO_UNREGISTER,
        sys::UFFDIO_WAKE,
        sys::UFFDIO_COPY,
        sys::UFFDIO_ZEROPAGE,
        sys::UFFDIO_MOVE,
        sys::UFFDIO_WRITEPROTECT,
        sys::UFFDIO_CONTINUE,
        sys::UFFDIO_POISON,
        sys::USERFAULTFD_IOC_NEW,
    ];

    assert_eq!((sys::UFFD_API, sys::UFFD_USER_MODE_ONLY), (0xaa, 1));
    assert_eq!(modes, [1, 2, 4]);
    assert_eq!([asks, protects, moves, continues], [[1, 2]; 4]);
    assert_eq!((sys::UFFDIO_ZEROPAGE_MODE_DONTWAKE, sys::UFFDIO_POISON_MODE_DONTWAKE), (1, 1));
    assert_eq!(faults, [1, 2, 4]);
    assert_eq!(events, [0x12, 0x13, 0x14, 0x15, 0x16]);
    assert_eq!(
        ioctls,
        [
            0xc018_aa3f,
            0xc020_aa00,
            0x8010_aa01,
            0x8010_aa02,
            0xc028_aa03,
            0xc020_aa04,
            0xc028_aa05,
            0xc018_aa06,
            0xc020_aa07,
            0xc020_aa08,
            0xaa00,
        ]
    );
}
