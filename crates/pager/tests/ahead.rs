//! What is brought although nobody waits for it: the rest of blocks of which half was wanted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::Arc;

use pager::PageSource;
use uffd::{Mapping, MappingKind, Residency};

use support::area::Gated;
use support::{Bytes, PAGE, Served, elsewhere, finish, image, read, serve};

/// Pages of a block of 16 MiB; there are two.
const BLOCK: usize = 4096;
/// Pages that the faults of `want_half` bring.
const HALF: usize = BLOCK / 2;

fn serve_blocks(source: Arc<dyn PageSource>) -> Option<Served> {
    serve(Mapping::new(2 * BLOCK * PAGE, MappingKind::Private).unwrap(), source, |_| {})
}

/// Pages whose faults bring the first half of the first block: an eighth of it by windows of 64 KiB, the rest by windows of
/// 256 KiB. Backwards, because one right behind the other would be a stream.
fn half() -> Vec<usize> {
    (0..BLOCK / 8).step_by(16).rev().chain((BLOCK / 8..HALF).step_by(64).rev()).collect()
}

fn touch(served: &Served, pages: &[usize]) {
    for page in pages {
        read(&served.mapping, page * PAGE, 1);
    }
}

fn want_half(served: &Served) {
    touch(served, &half());
}

fn present(served: &Served, first: usize, pages: usize) -> usize {
    let states = served.mapping.residency(first * PAGE, pages * PAGE).unwrap();
    states.into_iter().filter(|&state| state == Residency::Present).count()
}

#[test]
fn a_block_of_which_half_was_wanted_comes_as_a_whole_and_no_other() {
    let bytes = image(2 * BLOCK);
    let Some(served) = serve_blocks(Arc::new(Bytes(bytes.clone()))) else { return };

    want_half(&served);
    served.until("the rest of the block", |stats| stats.pages_prefetched == HALF as u64);
    let faults = served.stats().faults;

    assert!(read(&served.mapping, 0, BLOCK * PAGE) == bytes[..BLOCK * PAGE]);
    assert_eq!(served.stats().faults, faults, "nobody had to wait for the second half");
    assert_eq!(present(&served, 0, BLOCK), BLOCK);
    assert_eq!(present(&served, BLOCK, BLOCK), 0);
    served.close();
}

#[test]
fn what_lies_before_a_stream_comes_without_faults_and_ever_more_of_it() {
    let bytes = image(2 * BLOCK);
    let Some(served) = serve_blocks(Arc::new(Bytes(bytes.clone()))) else { return };

    touch(&served, &[0, 16, 32, 64]);
    served.until("behind 256 KiB", |stats| stats.pages_prefetched == 64);
    assert_eq!(present(&served, 0, 192), 192);
    touch(&served, &[100, 191, 192]);
    served.until("behind 512 KiB", |stats| stats.pages_prefetched == 64 + 192);

    assert_eq!(served.stats().faults, 5);
    assert_eq!(present(&served, 0, BLOCK), 448);
    assert!(read(&served.mapping, 0, 2 * BLOCK * PAGE) == bytes);
    served.close();
}

#[test]
fn a_page_given_back_before_a_stream_reaches_it_stays_zero() {
    let bytes = image(BLOCK);
    let Some(served) = serve_blocks(Arc::new(Bytes(image(2 * BLOCK)))) else { return };
    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || mapping.discard(150 * PAGE, 8 * PAGE).unwrap()));

    touch(&served, &[0, 16, 32, 64]);
    served.until("what is left of it", |stats| stats.pages_prefetched == 64 - 8);

    let mut expected = bytes[..192 * PAGE].to_vec();
    expected[150 * PAGE..158 * PAGE].fill(0);
    assert!(read(&served.mapping, 0, 192 * PAGE) == expected);
    served.close();
}

#[test]
fn less_than_half_is_left_at_that() {
    let Some(served) = serve_blocks(Arc::new(Bytes(image(2 * BLOCK)))) else { return };

    touch(&served, half().split_last().unwrap().1);
    // In the other block, after which anything ahead would have had its turn.
    read(&served.mapping, BLOCK * PAGE, 1);
    read(&served.mapping, (BLOCK + 16) * PAGE, 1);

    assert_eq!(served.stats().pages_prefetched, 0);
    assert_eq!(present(&served, 0, BLOCK), HALF - 64);
    served.close();
}

#[test]
fn what_was_given_back_stays_zero_also_where_the_block_is_filled_later() {
    let bytes = image(2 * BLOCK);
    let Some(served) = serve_blocks(Arc::new(Bytes(bytes.clone()))) else { return };
    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || mapping.discard((HALF + 100) * PAGE, 8 * PAGE).unwrap()));

    want_half(&served);
    served.until("the rest of the block", |stats| stats.pages_prefetched == HALF as u64 - 8);

    let mut expected = bytes[HALF * PAGE..BLOCK * PAGE].to_vec();
    expected[100 * PAGE..108 * PAGE].fill(0);
    assert!(read(&served.mapping, HALF * PAGE, HALF * PAGE) == expected);
    served.close();
}

#[test]
fn reads_ahead_leave_room_for_those_of_faults() {
    let bytes = image(2 * BLOCK);
    let source = Gated::new(bytes.clone());
    let Some(served) = serve_blocks(Arc::<Gated>::clone(&source)) else { return };
    let half = half();
    let (&last, rest) = half.split_last().unwrap();
    touch(&served, rest);
    // Where windows took long on a busy machine, pages went before the rest of them.
    served.until("all that was touched", |_| present(&served, 0, HALF) == HALF - 64);
    let before = served.stats();

    let gate = source.shut();
    let mapping = Arc::clone(&served.mapping);
    let last = elsewhere(move || read(&mapping, last * PAGE, 1));
    // The fault's own, and those ahead: half of what may be under way at once.
    served.until("as many reads ahead as may be", |stats| stats.worker_reads == before.worker_reads + 16);
    let mapping = Arc::clone(&served.mapping);
    let other = elsewhere(move || read(&mapping, BLOCK * PAGE, PAGE));
    served.until("the read of a fault", |stats| stats.worker_reads == before.worker_reads + 17);
    drop(gate);

    assert!(finish(&other) == bytes[BLOCK * PAGE..(BLOCK + 1) * PAGE]);
    finish(&last);
    assert_eq!(served.stats().deferred, 0, "no fault was put off");
    served.until("the rest of the block", |_| present(&served, 0, BLOCK) == BLOCK);
    assert!(read(&served.mapping, 0, BLOCK * PAGE) == bytes[..BLOCK * PAGE]);
    served.close();
}

#[test]
fn a_source_that_fails_ahead_ends_the_session_by_its_policy() {
    /// Fails where nobody has touched.
    #[derive(Debug)]
    struct Half(Vec<u8>);

    impl PageSource for Half {
        fn size(&self) -> u64 {
            2 * self.0.len() as u64
        }

        fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<pager::ReadNow, pager::PagerError> {
            self.read(offset, buffer).map(|()| pager::ReadNow::Done)
        }

        fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), pager::PagerError> {
            let failed = pager::PagerError::Internal("nothing there".to_owned());
            let bytes = self.0.get(offset as usize..offset as usize + buffer.len()).ok_or(failed)?;
            buffer.copy_from_slice(bytes);
            Ok(())
        }
    }

    let source = Half(image(HALF));
    let mapping = Mapping::new(BLOCK * PAGE, MappingKind::Private).unwrap();
    let Some(served) = serve(mapping, Arc::new(source), |_| {}) else { return };

    want_half(&served);

    assert_eq!(served.end().reason, pager::EndReason::SourceFailed);
    let states = served.mapping.residency(HALF * PAGE, HALF * PAGE).unwrap();
    assert!(states.iter().all(|&state| state == Residency::Noted), "poisoned");
}
