//! Sources that are asked: every chunk once, so many at a time, and nothing forgotten.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pager::{CallbackOptions, CallbackSource, EndReason, Fetcher, PagerError};
use uffd::{AnonymousOptions, Mapping, Pages};

use support::{DEADLINE, PAGE, Served, elsewhere, finish, image, serve};

const CHUNK: usize = 16 * PAGE;

/// A request: id, offset, length.
type Asked = (u64, u64, usize);

struct Mailbox(Mutex<Sender<Asked>>);

impl Fetcher for Mailbox {
    fn request(&self, id: u64, offset: u64, len: usize) {
        self.0.lock().unwrap().send((id, offset, len)).unwrap();
    }
}

fn source(pages: usize, adjust: impl FnOnce(&mut CallbackOptions)) -> (Arc<CallbackSource>, Receiver<Asked>) {
    let (sender, asked) = channel();
    let mut options = CallbackOptions {
        size: (pages * PAGE) as u64,
        chunk: CHUNK,
        concurrency: 4,
        cache_bytes: 0,
        thread: None,
    };
    adjust(&mut options);
    (Arc::new(CallbackSource::new(options, Box::new(Mailbox(Mutex::new(sender)))).unwrap()), asked)
}

fn served(pages: usize, source: &Arc<CallbackSource>, timeout: Duration) -> Option<Served> {
    // Aligned for huge pages: windows are aligned in addresses, and here they are in the source as well.
    let options = AnonymousOptions { shared: false, pages: Pages::Transparent };
    let mapping = Mapping::anonymous(pages * PAGE, options).unwrap();
    serve(mapping, Arc::<CallbackSource>::clone(source), |options| options.source_timeout = timeout)
}

fn touch(served: &Served, page: usize) -> Receiver<Result<u8, i32>> {
    let mapping = Arc::clone(&served.mapping);
    elsewhere(move || {
        let mut byte = [0];
        mapping.read_checked(page * PAGE, &mut byte).map(|()| byte[0]).map_err(|error| error.errno())
    })
}

fn next(asked: &Receiver<Asked>) -> Asked {
    asked.recv_timeout(DEADLINE).expect("nobody asks")
}

#[test]
fn a_chunk_is_asked_for_once_however_many_wait_for_it() {
    let bytes = image(64);
    let (source, asked) = source(64, |_| {});
    let Some(first) = served(64, &source, DEADLINE) else { return };
    let Some(second) = served(64, &source, DEADLINE) else { return };
    let waiting = [touch(&first, 3), touch(&first, 5), touch(&second, 3)];
    let (id, offset, len) = next(&asked);
    assert_eq!((offset, len), (0, CHUNK));
    // Until both sessions wait: the second one's read has no request of its own that could be waited for.
    for session in [&first, &second] {
        let until = std::time::Instant::now() + DEADLINE;
        while session.info.stats.snapshot().worker_reads < 1 {
            assert!(std::time::Instant::now() < until);
            std::thread::yield_now();
        }
    }

    source.answer(id, Ok(&bytes[..CHUNK]));

    for (answer, page) in waiting.iter().zip([3, 5, 3]) {
        assert_eq!(finish(answer), Ok(bytes[page * PAGE]));
    }
    assert!(asked.try_recv().is_err(), "nothing else was asked for");
    first.close();
    second.close();
}

#[test]
fn so_many_chunks_are_on_the_way_and_the_others_wait_their_turn() {
    let bytes = image(256);
    let (source, asked) = source(256, |options| options.concurrency = 2);
    let Some(served) = served(256, &source, DEADLINE) else { return };
    // Every second one: one right behind the other would be a stream.
    let waiting: Vec<_> = (0..5).map(|chunk| touch(&served, chunk * 32)).collect();
    let until = std::time::Instant::now() + DEADLINE;
    while served.info.stats.snapshot().worker_reads < 5 {
        assert!(std::time::Instant::now() < until);
        std::thread::yield_now();
    }
    let mut on_the_way = vec![next(&asked), next(&asked)];
    assert!(asked.try_recv().is_err(), "two at a time");

    for _ in 0..5 {
        let (id, offset, len) = on_the_way.remove(0);
        source.answer(id, Ok(&bytes[offset as usize..offset as usize + len]));
        on_the_way.extend(asked.recv_timeout(Duration::from_millis(if on_the_way.len() < 2 {
            100
        } else {
            0
        })));
    }

    for (chunk, answer) in waiting.iter().enumerate() {
        assert_eq!(finish(answer), Ok(bytes[2 * chunk * CHUNK]));
    }
    served.close();
}

#[test]
fn what_is_in_the_cache_is_not_asked_for_again() {
    let bytes = image(32);
    let (source, asked) = source(32, |options| options.cache_bytes = CHUNK);
    let Some(first) = served(32, &source, DEADLINE) else { return };
    let answer = touch(&first, 1);
    let (id, ..) = next(&asked);
    source.answer(id, Ok(&bytes[..CHUNK]));
    assert_eq!(finish(&answer), Ok(bytes[PAGE]));

    let Some(second) = served(32, &source, DEADLINE) else { return };
    assert_eq!(finish(&touch(&second, 2)), Ok(bytes[2 * PAGE]));

    assert!(asked.try_recv().is_err());
    first.close();
    second.close();
}

#[test]
fn a_window_over_several_chunks_is_put_together_and_the_last_chunk_may_be_short() {
    let bytes = image(21);
    let (source, asked) = source(21, |options| options.chunk = 4 * PAGE);
    let Some(served) = served(21, &source, DEADLINE) else { return };
    let answer = touch(&served, 17);
    let mut requests = vec![next(&asked), next(&asked)];
    assert_eq!((requests[0].1, requests[0].2), (16 * PAGE as u64, 4 * PAGE));
    assert_eq!((requests[1].1, requests[1].2), (20 * PAGE as u64, PAGE));
    for (id, offset, len) in requests.drain(..) {
        source.answer(id, Ok(&bytes[offset as usize..offset as usize + len]));
    }
    assert_eq!(finish(&answer), Ok(bytes[17 * PAGE]));

    let answer = touch(&served, 0);
    requests.extend((0..4).map(|_| next(&asked)));
    for &(id, offset, len) in requests.iter().rev() {
        source.answer(id, Ok(&bytes[offset as usize..offset as usize + len]));
    }

    assert_eq!(finish(&answer), Ok(bytes[0]));
    assert_eq!(support::read(&served.mapping, 0, PAGE), bytes[..PAGE]);
    served.close();
}

/// What a source can do wrong, and how the session ends.
#[test]
fn whatever_a_source_does_wrong_ends_by_the_policy_and_never_in_zeros() {
    let failure = || PagerError::Callback("out of order".to_owned());
    type Wrong = fn(&CallbackSource, u64, usize, PagerError);
    let wrongs: [(&str, Wrong, EndReason); 5] = [
        ("fails", |source, id, _, error| source.answer(id, Err(error)), EndReason::SourceFailed),
        (
            "answers short",
            |source, id, len, _| source.answer(id, Ok(&vec![1; len - 1])),
            EndReason::SourceFailed,
        ),
        (
            "answers long",
            |source, id, len, _| source.answer(id, Ok(&vec![1; len + 1])),
            EndReason::SourceFailed,
        ),
        ("never answers", |_, _, _, _| {}, EndReason::Stalled),
        ("ends", |source, _, _, _| source.close(), EndReason::SourceFailed),
    ];
    for (what, act, reason) in wrongs {
        let (source, asked) = source(16, |_| {});
        let timeout = if reason == EndReason::Stalled { Duration::from_millis(50) } else { DEADLINE };
        let Some(served) = served(16, &source, timeout) else { return };
        let answer = touch(&served, 7);
        let (id, _, len) = next(&asked);

        act(&source, id, len, failure());

        assert_eq!(finish(&answer), Err(libc_efault()), "{what}: a poisoned page");
        let end = served.end();
        assert_eq!(end.reason, reason, "{what}");
        assert!(end.error.is_some(), "{what}");
        // Too late, or once more: nothing happens.
        source.answer(id, Ok(&vec![1; len]));
        source.answer(id, Ok(&vec![1; len]));
        assert_eq!(finish(&touch(&served, 8)), Err(libc_efault()), "{what}: the rest is poisoned, too");
    }
}

fn libc_efault() -> i32 {
    nix::errno::Errno::EFAULT as i32
}

#[test]
fn bytes_that_come_after_the_page_was_given_back_are_not_installed() {
    let bytes = image(16);
    let (source, asked) = source(16, |_| {});
    let Some(served) = served(16, &source, DEADLINE) else { return };
    let answer = touch(&served, 2);
    let (id, ..) = next(&asked);
    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || mapping.discard(2 * PAGE, PAGE).unwrap()));
    let until = std::time::Instant::now() + DEADLINE;
    while served.info.stats.snapshot().pages_removed < 1 {
        assert!(std::time::Instant::now() < until);
        std::thread::yield_now();
    }

    source.answer(id, Ok(&bytes[..CHUNK]));

    assert_eq!(finish(&answer), Ok(0));
    assert_eq!(finish(&touch(&served, 3)), Ok(bytes[3 * PAGE]));
    served.close();
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let options = CallbackOptions { size: 4096, chunk: 4096, concurrency: 1, cache_bytes: 0, thread: None };
    for wrong in [
        CallbackOptions { size: 0, ..options },
        CallbackOptions { chunk: 0, ..options },
        CallbackOptions { chunk: 5000, ..options },
        CallbackOptions { chunk: 2 << 30, ..options },
    ] {
        let (sender, _) = channel();
        let refused = CallbackSource::new(wrong, Box::new(Mailbox(Mutex::new(sender))));
        assert!(matches!(refused, Err(PagerError::Unsupported(_))), "{wrong:?}");
    }
}
