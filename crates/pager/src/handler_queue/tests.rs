//! The queue by itself: no kernel, and a clock that stands still.

use uffd::{Fault, FaultKind};

use super::*;

const PAGE: u64 = 4096;

fn fault(address: u64) -> Event {
    Event::Fault(Fault { address, kind: FaultKind::Missing, write: false, thread_id: Some(7) })
}

fn queue(now: Instant) -> HandlerQueue {
    HandlerQueue::new(PAGE, now)
}

fn next_fault(queue: &mut HandlerQueue) -> OpenFault {
    let told = queue.deliver();
    queue.deliver_fault().unwrap_or_else(|| panic!("expected a fault, got {told:?}"))
}

fn is_all_told(queue: &mut HandlerQueue) -> bool {
    queue.deliver().is_none() && queue.deliver_fault().is_none()
}

#[test]
fn events_come_before_the_faults_that_were_read_first() {
    let now = Instant::now();
    let mut queue = queue(now);
    queue.push(fault(0x1000), now);
    queue.push(Event::Remove { start: 0x8000, end: 0x9000 }, now);
    queue.push(fault(0x2000), now);

    assert!(queue.deliver_fault().is_none());
    assert!(matches!(queue.deliver(), Some(Delivery::Event(Event::Remove { start: 0x8000, .. }))));
    assert_eq!(next_fault(&mut queue).page, 0x1000);
    assert_eq!(next_fault(&mut queue).page, 0x2000);
    assert!(is_all_told(&mut queue));
}

#[test]
fn messages_about_one_page_are_one_fault_until_it_is_answered() {
    let now = Instant::now();
    let mut queue = queue(now);
    for address in [0x1000, 0x1010, 0x1fff] {
        queue.push(fault(address), now);
    }
    let first = next_fault(&mut queue);
    queue.push(fault(0x1000), now);
    assert!(!queue.has_deliveries());

    queue.close(first.id);
    queue.push(fault(0x1000), now);

    assert_ne!(next_fault(&mut queue).id, first.id);
}

#[test]
fn what_goes_while_a_fault_is_open_makes_its_answer_stale_and_delivers_it_again() {
    let now = Instant::now();
    for event in [
        Event::Remove { start: 0x1000, end: 0x3000 },
        Event::Unmap { start: 0x2000, end: 0x3000 },
        Event::Remap { from: 0x2000, to: 0x9000, len: 0x1000 },
    ] {
        let mut queue = queue(now);
        queue.push(fault(0x2000), now);
        queue.push(fault(0x4000), now);
        let (given, other) = (next_fault(&mut queue), next_fault(&mut queue));

        queue.push(event, now);

        assert!(queue.given(given.id).is_none());
        assert!(queue.given(other.id).is_some(), "it lies outside");
        assert!(matches!(queue.deliver(), Some(Delivery::Stale(id)) if id == given.id));
        assert!(matches!(queue.deliver(), Some(Delivery::Event(_))));
        let again = next_fault(&mut queue);
        assert!(again.is_removed() && again.page == 0x2000);
    }
}

#[test]
fn a_fault_that_was_not_delivered_yet_is_told_as_removed_once() {
    let now = Instant::now();
    let mut queue = queue(now);
    queue.push(fault(0x2000), now);
    queue.push(Event::Remove { start: 0x2000, end: 0x3000 }, now);

    assert!(matches!(queue.deliver(), Some(Delivery::Event(_))));
    assert!(next_fault(&mut queue).is_removed());
    assert!(is_all_told(&mut queue));
}

#[test]
fn parked_faults_come_back_after_pauses_that_grow_to_their_limit() {
    let now = Instant::now();
    let mut queue = queue(now);
    queue.push(fault(0x1000), now);
    let mut pauses = Vec::new();
    for _ in 0..10 {
        let fault = next_fault(&mut queue);
        assert!(queue.park(fault.id, now));
        assert!(queue.given(fault.id).is_none(), "a late answer does not reach it");
        let pause = queue.unpark(now).map_or(Duration::ZERO, |due| due - now);
        pauses.push(pause);
        assert_eq!(queue.unpark(now + pause), None);
    }

    assert_eq!(pauses[..3], [Duration::ZERO, FIRST_PAUSE, FIRST_PAUSE * 2]);
    assert_eq!(pauses[9], LONGEST_PAUSE);
}

#[test]
fn a_deadline_counts_from_the_message_however_often_the_fault_was_put_off() {
    let now = Instant::now();
    let second = Duration::from_secs(1);
    let mut queue = queue(now);
    queue.push(fault(0x1000), now);
    let id = next_fault(&mut queue).id;
    queue.park(id, now + second / 2);

    assert_eq!(queue.expire(now + second / 2, second), None);
    assert_eq!(queue.expire(now + second, second).map(|fault| fault.page), Some(0x1000));
    assert_eq!(queue.unpark(now + second * 2), None);
    assert_eq!(queue.open(), 0);
}

#[test]
fn a_place_is_used_again_and_never_queued_twice() {
    let now = Instant::now();
    let mut queue = queue(now);
    queue.push(fault(0x1000), now);
    assert!(queue.take_of_thread(8).is_none());
    assert!(queue.take_of_thread(7).is_some());
    queue.push(fault(0x2000), now);

    assert_eq!(next_fault(&mut queue).page, 0x2000);
    assert!(is_all_told(&mut queue));
}

#[test]
fn nothing_grows_however_many_faults_come_and_go() {
    let now = Instant::now();
    let mut queue = queue(now);
    let before = (queue.parked.capacity(), queue.ready.capacity(), queue.notices.capacity());
    for round in 0..100_000_u64 {
        queue.push(fault((round * 7919 % 100_000) * PAGE), now);
        if queue.room() == 0 || round % 3 == 0 {
            let id = next_fault(&mut queue).id;
            queue.close(id);
        }
    }
    while let Some(fault) = queue.deliver_fault() {
        queue.close(fault.id);
    }

    assert_eq!(queue.open(), 0);
    assert_eq!(before.1..=before.2, queue.ready.capacity()..=queue.notices.capacity());
    // What it counts as room shrinks while it is not tidied up.
    assert_eq!(queue.parked.capacity(), before.0);
}

#[test]
fn pages_have_the_size_of_their_area() {
    let now = Instant::now();
    let mut queue = queue(now);
    queue.set_areas(vec![Area { start: 0x20_0000, len: 0x40_0000, page_size: 0x20_0000 }]);
    queue.push(fault(0x41_2345), now);
    queue.push(fault(0x1234), now);

    assert_eq!(next_fault(&mut queue).page, 0x40_0000);
    assert_eq!(next_fault(&mut queue).page, 0x1000);
}

#[test]
fn a_protected_and_a_missing_page_are_two_faults_and_a_read_becomes_a_write() {
    let now = Instant::now();
    let mut queue = queue(now);
    let of = |kind, write| Event::Fault(Fault { address: 0x1000, kind, write, thread_id: None });
    queue.push(of(FaultKind::Missing, false), now);
    queue.push(of(FaultKind::WriteProtect, true), now);
    queue.push(of(FaultKind::Missing, true), now);

    let (missing, protected) = (next_fault(&mut queue), next_fault(&mut queue));

    assert_eq!((missing.flags, protected.flags), (WRITE, WRITE | 1));
    assert!(is_all_told(&mut queue));
}
