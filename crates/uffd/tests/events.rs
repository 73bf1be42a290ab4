//! Messages: all six kinds with their fields, many per read, descriptors that are never lost.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::Arc;

use uffd::{Event, EventBuffer, FaultKind, Features, MappingKind, Modes};

use support::{DEADLINE, PAGE, elsewhere, events, fault, finish, pages, register, registered};

const M: Modes = Modes::MISSING;

fn advise(address: u64, len: u64, advice: i32) -> i32 {
    // SAFETY: a range of the test's own mapping, to which nothing refers.
    unsafe { libc::madvise(address as *mut libc::c_void, len as usize, advice) }
}

#[test]
fn a_read_fault_and_a_write_fault_are_told_apart_and_carry_the_page() {
    let Some((uffd, mapping)) = registered(2, M, Features::empty()) else { return };
    let mapping = Arc::new(mapping);
    let (reader, writer) = (Arc::clone(&mapping), Arc::clone(&mapping));
    let read = elsewhere(move || reader.read(100, &mut [0]).unwrap());
    let first = fault(&uffd);
    uffd.zero(mapping.address(), PAGE, true).unwrap();
    finish(&read);
    let written = elsewhere(move || writer.write(PAGE as usize + 5, &[1]).unwrap());
    let second = fault(&uffd);
    uffd.zero(mapping.address() + PAGE, PAGE, true).unwrap();
    finish(&written);

    assert_eq!(
        (first.kind, first.write, first.address, first.thread_id),
        (FaultKind::Missing, false, mapping.address(), None)
    );
    assert_eq!((second.write, second.address), (true, mapping.address() + PAGE));
}

#[test]
fn thread_ids_and_exact_addresses_come_when_they_are_enabled() {
    let Some((uffd, mapping)) = registered(1, M, Features::THREAD_ID | Features::EXACT_ADDRESS) else {
        return;
    };
    let mapping = Arc::new(mapping);
    let reader = Arc::clone(&mapping);
    let thread = elsewhere(move || {
        reader.read(123, &mut [0]).unwrap();
        // SAFETY: takes nothing, returns the caller's id.
        unsafe { libc::gettid() }
    });

    let fault = fault(&uffd);
    uffd.zero(mapping.address(), PAGE, true).unwrap();

    assert_eq!(fault.address, mapping.address() + 123);
    assert_eq!(fault.thread_id, Some(finish(&thread) as u32));
}

#[test]
fn a_minor_fault_is_one() {
    let Some(uffd) = support::uffd(Features::MINOR_SHMEM) else { return };
    let mapping = Arc::new(pages(1, MappingKind::Shared));
    nix::sys::uio::pwrite(mapping.memfd().unwrap(), &[3; PAGE as usize], 0).unwrap();
    register(&uffd, &mapping, Modes::MINOR);
    let reader = Arc::clone(&mapping);
    let byte = elsewhere(move || {
        let mut byte = [0];
        reader.read(0, &mut byte).unwrap();
        byte[0]
    });

    assert_eq!(fault(&uffd).kind, FaultKind::Minor);
    uffd.continue_pages(mapping.address(), PAGE, uffd::ContinueOptions::default()).unwrap();

    assert_eq!(finish(&byte), 3);
}

#[test]
fn many_threads_are_read_at_once_and_in_one_call() {
    const THREADS: usize = 5;
    let Some((uffd, mapping)) = registered(THREADS, M, Features::empty()) else { return };
    let mapping = Arc::new(mapping);
    let waiting: Vec<_> = (0..THREADS)
        .map(|page| {
            let reader = Arc::clone(&mapping);
            elsewhere(move || reader.read(page * PAGE as usize, &mut [0]).unwrap())
        })
        .collect();
    let until = std::time::Instant::now() + DEADLINE;
    while uffd.waiting().unwrap().pending < THREADS as u64 {
        assert!(std::time::Instant::now() < until);
        std::thread::yield_now();
    }

    let mut buffer = EventBuffer::new(16);
    assert_eq!(uffd.read_events(&mut buffer).unwrap(), THREADS);
    let mut addresses: Vec<u64> = buffer
        .drain()
        .map(|event| match event {
            Event::Fault(fault) => fault.address,
            other => panic!("{other:?}"),
        })
        .collect();
    addresses.sort_unstable();

    let expected: Vec<u64> = (0..THREADS as u64).map(|page| mapping.address() + page * PAGE).collect();
    assert_eq!(addresses, expected);
    assert_eq!(uffd.waiting().unwrap().total, THREADS as u64);
    uffd.zero(mapping.address(), mapping.len() as u64, true).unwrap();
    waiting.iter().for_each(finish);
}

#[test]
fn discarding_unmapping_and_moving_are_told_with_their_bounds() {
    let features = Features::EVENT_REMOVE | Features::EVENT_UNMAP | Features::EVENT_REMAP;
    let Some((uffd, mapping)) = registered(4, M, features) else { return };
    // Never unmapped: that would wait for its own event to be read, for ever if this test fails.
    let start = std::mem::ManuallyDrop::new(mapping).address();

    let discarded = elsewhere(move || advise(start + PAGE, 2 * PAGE, libc::MADV_DONTNEED));
    let removed = events(&uffd, 1).remove(0);
    assert_eq!(finish(&discarded), 0);
    let unmapped = elsewhere(move || {
        // SAFETY: the last page of the test's own mapping, to which nothing refers.
        unsafe { libc::munmap((start + 3 * PAGE) as *mut libc::c_void, PAGE as usize) }
    });
    let gone = events(&uffd, 1).remove(0);
    assert_eq!(finish(&unmapped), 0);
    let moved = elsewhere(move || {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
        let (old, size, anywhere) = (start as *mut libc::c_void, PAGE as usize, std::ptr::null_mut::<u8>());
        // SAFETY: the first page of the test's own mapping, to which nothing refers; it stays mapped.
        unsafe { libc::mremap(old, size, size, flags, anywhere) as u64 }
    });
    let remapped = events(&uffd, 1).remove(0);

    let target = finish(&moved);
    assert!(
        matches!(removed, Event::Remove { start: s, end } if (s, end) == (start + PAGE, start + 3 * PAGE))
    );
    assert!(
        matches!(gone, Event::Unmap { start: s, end } if (s, end) == (start + 3 * PAGE, start + 4 * PAGE))
    );
    assert!(matches!(remapped, Event::Remap { from, to, len } if (from, to, len) == (start, target, PAGE)));
}
