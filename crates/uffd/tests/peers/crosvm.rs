//! google/crosvm, `swap/tests`: what its page handler takes for granted of a uffd.

use std::sync::Arc;

use uffd::{Event, Features, Mapping, MappingError, MappingKind, Modes, UffdError, Userfaultfd};

use crate::processes::until;
use crate::reader;
use crate::support::{PAGE, elsewhere, events, fault, finish, pages, register, uffd};

const M: Modes = Modes::MISSING;

/// Shared memory, as a virtual machine has it.
fn guest(count: usize, features: Features) -> Option<(Userfaultfd, Arc<Mapping>)> {
    let uffd = uffd(Features::MISSING_SHMEM | features)?;
    let memory = pages(count, MappingKind::Shared);
    register(&uffd, &memory, M);
    Some((uffd, Arc::new(memory)))
}

#[test]
fn faults_at_the_start_the_middle_and_the_last_byte_of_pages_are_served_with_zeros() {
    let Some((uffd, memory)) = guest(3, Features::empty()) else { return };
    for offset in [0, PAGE + PAGE / 2, 3 * PAGE - 1] {
        let byte = reader(&memory, offset);

        let message = fault(&uffd);
        uffd.zero(message.address, PAGE, true).unwrap();

        assert_eq!(message.address, memory.address() + offset / PAGE * PAGE);
        assert_eq!(finish(&byte), 0);
    }
    let mut all = vec![1; 3 * PAGE as usize];
    memory.read(0, &mut all).unwrap();
    assert!(all.iter().all(|&byte| byte == 0));
}

#[test]
fn pages_in_front_of_and_behind_the_region_are_not_filled() {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let memory = pages(5, MappingKind::Shared);
    let page = |number: u64| memory.address() + number * PAGE;
    // SAFETY: no reference to the memory exists.
    unsafe { uffd.register(page(1), 3 * PAGE, M) }.unwrap();

    let filled = [0, 1, 3, 4].map(|number| uffd.zero(page(number), PAGE, true));

    let outside = Err(UffdError::NotRegistered);
    assert_eq!(filled, [outside, Ok(()), Ok(()), outside]);
}

#[test]
fn a_second_fault_on_a_page_that_is_there_by_now_is_woken() {
    let Some((uffd, memory)) = guest(1, Features::empty()) else { return };
    let waiting = [reader(&memory, 0), reader(&memory, 100)];
    let faults = events(&uffd, 2);
    assert!(faults.iter().all(|event| matches!(event, Event::Fault(_))), "{faults:?}");

    // The first is answered, but only the answer to the second wakes.
    uffd.zero(memory.address(), PAGE, false).unwrap();
    assert_eq!(uffd.zero(memory.address(), PAGE, true), Err(UffdError::PageExist));
    assert_eq!(uffd.waiting().unwrap().total, 2, "the refusal wakes nobody");
    uffd.wake(memory.address(), PAGE).unwrap();

    assert_eq!(waiting.map(|byte| finish(&byte)), [0, 0]);
}

#[test]
fn a_page_that_was_written_and_removed_faults_again_and_reads_zero() {
    let Some((uffd, memory)) = guest(2, Features::EVENT_REMOVE) else { return };
    let (writing, removing) = (Arc::clone(&memory), Arc::clone(&memory));
    let written = elsewhere(move || writing.write(PAGE as usize, &[1; PAGE as usize]).unwrap());
    let first = fault(&uffd).address;
    uffd.zero(first, PAGE, true).unwrap();
    finish(&written);

    let removed = elsewhere(move || removing.discard(PAGE as usize, PAGE as usize).unwrap());
    let Event::Remove { start, end } = events(&uffd, 1).remove(0) else { panic!("no REMOVE event") };
    finish(&removed);
    let byte = reader(&memory, PAGE);
    let again = fault(&uffd).address;
    until("it is filled", || uffd.zero(again, PAGE, true).is_ok());

    assert_eq!((start, end), (first, first + PAGE));
    assert_eq!((again, finish(&byte)), (first, 0));
}

#[test]
fn only_whole_pages_are_removed() {
    let memory = pages(2, MappingKind::Shared);
    memory.write(0, &[1; 2 * PAGE as usize]).unwrap();
    let page = PAGE as usize;

    let unaligned =
        [(1, page), (page, page - 1), (0, page + 1)].map(|(offset, len)| memory.discard(offset, len));
    let mut bytes = vec![0; 2 * page];
    memory.read(0, &mut bytes).unwrap();
    let all = memory.discard(0, 2 * page);

    let refused = |result: &Result<(), MappingError>| matches!(result, Err(MappingError::Unaligned { .. }));
    assert!(unaligned.iter().all(refused), "{unaligned:?}");
    assert!(bytes.iter().all(|&byte| byte == 1), "nothing was removed");
    assert_eq!(all, Ok(()));
    memory.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
}
