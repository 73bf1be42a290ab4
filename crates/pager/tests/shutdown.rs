//! The order in which a server ends, whatever of it is in the middle of something.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/alone.rs"]
mod alone;
mod support;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use pager::{
    EndReason, FailurePolicy, FillOptions, Image, Images, Listener, Notice, Pager, PagerOptions, Rest,
    ServerOptions, WorkingSet,
};
use uffd::fd_passing::send_all;
use uffd::{Mapping, MappingError, MappingKind, Modes};

use support::area::Gated;
use support::{DEADLINE, PAGE, elsewhere, finish, image, told};

const PAGES: usize = 8;

fn server(pager: &Pager, path: &Path) -> (u64, Receiver<Notice>) {
    let (observer, notices) = told();
    let options = ServerOptions {
        window: Some(PAGE as u64),
        handshake_timeout: DEADLINE,
        max_sessions: 10,
        ..ServerOptions::new(Images::Asked)
    };
    (pager.serve_firecracker(Listener::bind(path, None).unwrap(), options, observer), notices)
}

/// Hands memory over of which a thread waits for a page already.
fn hand_over(path: &Path) -> Option<(UnixStream, Receiver<Result<(), MappingError>>)> {
    let uffd = support::uffd()?;
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    let (address, len) = (mapping.address(), mapping.len());
    // SAFETY: no reference to the mapping exists; it is read by copying.
    unsafe { uffd.register(address, len as u64, Modes::MISSING) }.unwrap();
    let text = format!(r#"[{{"base_host_virt_addr":{address},"size":{len},"offset":0,"page_size":4096}}]"#);
    let socket = UnixStream::connect(path).unwrap();
    send_all(socket.as_fd(), text.as_bytes(), &[uffd.as_fd()], DEADLINE).unwrap();
    let waiting = elsewhere(move || mapping.read_checked(3 * PAGE, &mut [0]));
    Some((socket, waiting))
}

fn asked(notices: &Receiver<Notice>) -> u64 {
    match notices.recv_timeout(DEADLINE).unwrap() {
        Notice::Asking { id, .. } => id,
        other => panic!("{other:?}"),
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_server_stops_listening_then_fails_what_waits_then_ends_its_sessions_and_is_told_last() {
    let test = "a_server_stops_listening_then_fails_what_waits_then_ends_its_sessions_and_is_told_last";
    alone::alone(test, Duration::from_secs(60), || {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        let before = descriptors();
        let (id, notices) = server(&pager, &path);
        let source = Gated::new(image(PAGES));
        let shut = source.shut();

        // One that is served and whose source does not answer, one that nobody has decided about, one that says nothing.
        let Some((first, of_first)) = hand_over(&path) else { return };
        let image = Image {
            label: String::new(),
            source: Arc::<Gated>::clone(&source),
            policy: FailurePolicy::Poison,
            window: Some(PAGE as u64),
            fill: FillOptions::default(),
            source_timeout: pager::SOURCE_TIMEOUT,
            working_set: WorkingSet::default(),
        };
        pager.answer(asked(&notices), Ok(image));
        let Notice::SessionStarted(session) = notices.recv_timeout(DEADLINE).unwrap() else {
            panic!("not started")
        };
        while session.stats.snapshot().worker_reads == 0 {
            std::thread::yield_now();
        }
        let Some((second, of_second)) = hand_over(&path) else { return };
        let question = asked(&notices);
        let third = UnixStream::connect(&path).unwrap();

        pager.close_server(id, Rest::Poison);

        let mut order = Vec::new();
        loop {
            let notice = notices.recv_timeout(DEADLINE).unwrap();
            // From the first word of its end on nobody new can come.
            assert!(UnixStream::connect(&path).is_err());
            assert!(!path.exists());
            order.push(match notice {
                Notice::Rejected { asked: Some(id), error, .. } if id == question => {
                    assert_eq!(error.code(), "ERR_UFFD_USE_AFTER_CLOSE");
                    "turned away"
                }
                Notice::Rejected { asked: None, error, .. } => {
                    assert_eq!(error.code(), "ERR_UFFD_USE_AFTER_CLOSE");
                    "cut short"
                }
                Notice::SessionEnded { id, end } if id == session.id => {
                    assert_eq!(end.reason, EndReason::Closed);
                    "ended"
                }
                Notice::ServerClosed => break,
                other => panic!("{other:?}"),
            });
        }
        assert_eq!(order[0], "cut short", "{order:?}");
        order.sort_unstable();
        assert_eq!(order, ["cut short", "ended", "turned away"]);
        // Who waited was told, by poison, and not left to zeros.
        assert!(finish(&of_first).is_err() && finish(&of_second).is_err());
        drop((first, second, third, shut));
        // Everything of it was closed before.
        assert_eq!(descriptors(), before);
    });
}
