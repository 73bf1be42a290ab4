//! What goes wrong around a pager, made to go wrong: sources that stall, fail, panic or come late, peers that die, memory
//! that somebody else fills, descriptors that run out. Never zeros that nobody asked for, never a hang.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/alone.rs"]
mod alone;
mod support;

use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pager::{
    EndReason, FileSource, Images, Listener, Notice, PageSource, Pager, PagerError, PagerOptions, ReadNow,
    Rest, ServerOptions,
};
use uffd::fd_passing::send_all;
use uffd::{CopyOptions, Mapping, MappingKind, Modes, Residency, Userfaultfd};

use support::{Bytes, DEADLINE, PAGE, Served, elsewhere, finish, image, page_of, read, reading, serve, told};

/// What a read of the source does next.
#[derive(Debug)]
enum Then {
    Give,
    Fail,
    Panic,
}

/// A source of which one page is never at hand: reading it tells that it has begun, and waits to be told what to do.
#[derive(Debug)]
struct Gated {
    bytes: Vec<u8>,
    page: usize,
    begun: Mutex<Sender<()>>,
    gate: Mutex<Receiver<Then>>,
}

impl Gated {
    fn new(bytes: &[u8], page: usize) -> (Arc<Self>, Receiver<()>, Sender<Then>) {
        let (begun, has_begun) = channel();
        let (open, gate) = channel();
        let bytes = bytes.to_vec();
        (Arc::new(Self { bytes, page, begun: begun.into(), gate: gate.into() }), has_begun, open)
    }

    fn gates(&self, offset: u64, len: usize) -> bool {
        (offset as usize..offset as usize + len).contains(&(self.page * PAGE))
    }
}

impl PageSource for Gated {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        if self.gates(offset, buffer.len()) {
            return Ok(ReadNow::WouldBlock);
        }
        buffer.copy_from_slice(&self.bytes[offset as usize..][..buffer.len()]);
        Ok(ReadNow::Done)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        self.begun.lock().unwrap().send(()).unwrap();
        // A test that is over lets everything go.
        match self.gate.lock().unwrap().recv().unwrap_or(Then::Fail) {
            Then::Give => buffer.copy_from_slice(&self.bytes[offset as usize..][..buffer.len()]),
            Then::Fail => return Err(PagerError::Protocol("the store does not answer".to_owned())),
            Then::Panic => panic!("a source that panics"),
        }
        Ok(())
    }
}

/// A source that does the same whenever it is asked on the event loop.
#[derive(Debug)]
struct Broken(Then, u64);

impl PageSource for Broken {
    fn size(&self) -> u64 {
        self.1
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        match self.0 {
            Then::Panic => panic!("a source that panics"),
            _ => Err(PagerError::Protocol("the store does not answer".to_owned())),
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        self.read_now(offset, buffer).map(|_| ())
    }
}

const PAGES: usize = 8;

fn served(source: Arc<dyn PageSource>) -> Option<Served> {
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    serve(mapping, source, |options| options.window = Some(PAGE as u64))
}

/// The session has ended for this reason, and all pages but those that were there are poisoned.
fn assert_poisoned(served: &Served, reason: EndReason, present: &[usize]) {
    let end = served.end();
    assert_eq!(end.reason, reason, "{:?}", end.error);
    assert!(end.error.is_some() || reason == EndReason::Closed);
    let states = served.mapping.residency(0, PAGES * PAGE).unwrap();
    for (page, state) in states.into_iter().enumerate() {
        let expected = if present.contains(&page) { Residency::Present } else { Residency::Noted };
        assert_eq!(state, expected, "page {page}");
    }
}

#[test]
fn a_source_that_stalls_delays_only_who_waits_for_its_bytes() {
    let bytes = image(PAGES);
    let (source, begun, open) = Gated::new(&bytes, 3);
    let Some(served) = served(source) else { return };
    let waiting = reading(&served.mapping, 3);
    begun.recv_timeout(DEADLINE).unwrap();

    assert!(read(&served.mapping, 4 * PAGE, PAGE) == page_of(&bytes, 4));
    assert!(waiting.try_recv().is_err());

    open.send(Then::Give).unwrap();
    assert!(finish(&waiting).unwrap() == page_of(&bytes, 3));
    served.close();
}

#[test]
fn bytes_that_come_after_their_page_was_discarded_are_not_used() {
    let bytes = image(PAGES);
    let (source, begun, open) = Gated::new(&bytes, 3);
    let Some(served) = served(source) else { return };
    let waiting = reading(&served.mapping, 3);
    begun.recv_timeout(DEADLINE).unwrap();

    let mapping = Arc::clone(&served.mapping);
    finish(&elsewhere(move || mapping.discard(3 * PAGE, PAGE).unwrap()));
    open.send(Then::Give).unwrap();

    assert!(finish(&waiting).unwrap() == [0; PAGE]);
    assert_eq!(served.info.stats.snapshot().pages_installed, 0);
    served.close();
}

#[test]
fn bytes_that_come_after_the_session_was_closed_are_not_used() {
    let bytes = image(PAGES);
    let (source, begun, open) = Gated::new(&bytes, 3);
    let Some(served) = served(source) else { return };
    let waiting = reading(&served.mapping, 3);
    begun.recv_timeout(DEADLINE).unwrap();

    served.pager.close_session(served.id, Rest::Poison);

    // Whoever waits for a source that stalls is not left waiting.
    assert!(finish(&waiting).is_err());
    assert_poisoned(&served, EndReason::Closed, &[]);
    open.send(Then::Give).unwrap();
    assert!(finish(&reading(&served.mapping, 3)).is_err());
}

#[test]
fn a_source_that_fails_or_panics_late_ends_in_poison_and_not_in_zeros() {
    for then in [Then::Fail, Then::Panic] {
        let bytes = image(PAGES);
        let (source, begun, open) = Gated::new(&bytes, 3);
        let Some(served) = served(source) else { return };
        read(&served.mapping, PAGE, 1);
        let waiting = reading(&served.mapping, 3);
        begun.recv_timeout(DEADLINE).unwrap();

        open.send(then).unwrap();

        assert!(finish(&waiting).is_err());
        assert_poisoned(&served, EndReason::SourceFailed, &[1]);
        assert!(read(&served.mapping, PAGE, PAGE) == page_of(&bytes, 1));
    }
}

#[test]
fn a_source_that_fails_or_panics_at_once_ends_its_own_session_only() {
    let bytes = image(PAGES);
    let Some(good) = served(Arc::new(Bytes(bytes.clone()))) else { return };
    for then in [Then::Fail, Then::Panic] {
        let mapping = Arc::new(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap());
        let Some(uffd) = support::uffd() else { return };
        let (address, len) = (mapping.address(), mapping.len() as u64);
        // SAFETY: no reference to the mapping exists; it is read by copying.
        unsafe { uffd.register(address, len, Modes::MISSING) }.unwrap();
        let options = pager::SessionOptions {
            source_timeout: DEADLINE,
            ..pager::SessionOptions::new(
                vec![pager::Region { address, len, source_offset: 0 }],
                PAGE as u64,
                Arc::new(Broken(then, len)),
            )
        };
        let (observer, notices) = told();
        good.pager.adopt(uffd, options, observer).unwrap();

        assert!(finish(&reading(&mapping, 3)).is_err());

        let mut end = notices.recv_timeout(DEADLINE).unwrap();
        if matches!(end, Notice::SessionStarted(_)) {
            end = notices.recv_timeout(DEADLINE).unwrap();
        }
        assert!(
            matches!(&end, Notice::SessionEnded { end, .. } if end.reason == EndReason::SourceFailed),
            "{end:?}"
        );
    }
    assert!(read(&good.mapping, 0, PAGES * PAGE) == bytes);
    good.close();
}

#[test]
fn an_image_cut_short_while_it_is_served_ends_in_poison_whatever_was_left_of_it() {
    for left in [0, 3 * PAGE, 3 * PAGE + 100] {
        let bytes = image(PAGES);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let Some(served) = served(Arc::new(FileSource::open(file.path()).unwrap())) else { return };
        assert!(read(&served.mapping, PAGE, PAGE) == page_of(&bytes, 1));

        OpenOptions::new().write(true).open(file.path()).unwrap().set_len(left as u64).unwrap();

        // Also the pages in front of the cut: an image that changes is not one state of a machine.
        assert!(finish(&reading(&served.mapping, 3)).is_err());
        assert_poisoned(&served, EndReason::SourceFailed, &[1]);
    }
}

/// A second handle of a session's userfaultfd, as its peer has one.
fn serve_shared(source: Arc<dyn PageSource>) -> Option<(Served, Userfaultfd)> {
    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap();
    let uffd = support::uffd()?;
    let other = Userfaultfd::adopt(uffd.as_fd().try_clone_to_owned().unwrap()).unwrap();
    support::serve_by(uffd, mapping, source, |options| options.window = Some(PAGE as u64))
        .map(|served| (served, other))
}

#[test]
fn a_thread_that_sleeps_over_a_page_that_is_there_is_woken() {
    let bytes = image(PAGES);
    let (source, begun, open) = Gated::new(&bytes, 3);
    let Some((served, other)) = serve_shared(source) else { return };
    let waiting = reading(&served.mapping, 3);
    begun.recv_timeout(DEADLINE).unwrap();
    let foreign = vec![7_u8; PAGE];
    let address = served.mapping.address() + 3 * PAGE as u64;
    let asleep = CopyOptions { wake: false, ..CopyOptions::default() };
    // SAFETY: the destination is a missing page of the mapping, of which no reference exists.
    unsafe { other.copy(address, foreign.as_ptr(), PAGE, asleep) }.unwrap();
    assert!(waiting.try_recv().is_err());

    open.send(Then::Give).unwrap();

    assert!(finish(&waiting).unwrap() == foreign);
    drop(other);
    served.close();
    let stats = served.info.stats.snapshot();
    assert_eq!((stats.already_present, stats.faults_installed), (1, 0), "{stats:?}");
}

fn server(pager: &Pager, path: &Path, bytes: &[u8]) -> Receiver<Notice> {
    let (observer, notices) = told();
    let options = ServerOptions {
        window: Some(PAGE as u64),
        handshake_timeout: DEADLINE,
        max_sessions: 1000,
        ..ServerOptions::new(Images::One(Arc::new(Bytes(bytes.to_vec()))))
    };
    pager.serve_firecracker(Listener::bind(path, None).unwrap(), options, observer);
    notices
}

/// Registers a mapping and hands it over as Firecracker does.
fn hand_over(path: &Path, mapping: &Mapping) -> Option<(UnixStream, Userfaultfd)> {
    let uffd = support::uffd()?;
    let (address, len) = (mapping.address(), mapping.len());
    // SAFETY: no reference to the mapping exists; it is read by copying.
    unsafe { uffd.register(address, len as u64, Modes::MISSING) }.unwrap();
    let text = format!(r#"[{{"base_host_virt_addr":{address},"size":{len},"offset":0,"page_size":4096}}]"#);
    let socket = UnixStream::connect(path).unwrap();
    send_all(socket.as_fd(), text.as_bytes(), &[uffd.as_fd()], DEADLINE).unwrap();
    Some((socket, uffd))
}

#[test]
fn a_peer_that_closes_its_userfaultfd_and_its_connection_is_served_on() {
    let bytes = image(PAGES);
    let dir = tempfile::tempdir().unwrap();
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let notices = server(&pager, &dir.path().join("s"), &bytes);
    let mapping = Arc::new(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap());
    let Some((socket, uffd)) = hand_over(&dir.path().join("s"), &mapping) else { return };
    let Notice::SessionStarted(info) = notices.recv_timeout(DEADLINE).unwrap() else { panic!("not started") };

    drop((socket, uffd));

    assert!(read(&mapping, 0, PAGES * PAGE) == bytes);
    pager.close_session(info.id, Rest::Zero);
    assert!(matches!(notices.recv_timeout(DEADLINE).unwrap(), Notice::SessionEnded { .. }));
}

const PEER: &str = "PAGER_TEST_PEER";
const PEER_PAGES: usize = 16384;

/// For a second process: hands its memory over, and touches it until it is killed.
fn be_a_peer(path: &Path) {
    let mapping = Arc::new(Mapping::new(PEER_PAGES * PAGE, MappingKind::Private).unwrap());
    let Some(_connection) = hand_over(path, &mapping) else { return };
    let touch = |thread: usize| {
        let mapping = Arc::clone(&mapping);
        elsewhere(move || {
            for page in (thread..PEER_PAGES).step_by(4) {
                mapping.read(page * PAGE, &mut [0]).unwrap();
            }
        })
    };
    let threads: Vec<_> = (0..4).map(touch).collect();
    threads.iter().for_each(|thread| thread.recv().unwrap());
    std::thread::park();
}

fn start_peer(test: &str, path: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(PEER, path).stdout(Stdio::null());
    command.spawn().unwrap()
}

#[test]
fn a_peer_killed_while_its_pages_are_installed_ends_its_session_only() {
    if let Some(path) = std::env::var_os(PEER) {
        be_a_peer(Path::new(&path));
        return;
    }
    if support::uffd().is_none() {
        return;
    }
    let bytes = image(PEER_PAGES);
    let dir = tempfile::tempdir().unwrap();
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let notices = server(&pager, &dir.path().join("s"), &bytes);
    let mapping = Arc::new(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap());
    let Some(_connection) = hand_over(&dir.path().join("s"), &mapping) else { return };
    let Notice::SessionStarted(own) = notices.recv_timeout(DEADLINE).unwrap() else { panic!("not started") };

    let mut fastest = Duration::MAX;
    for round in 0..5 {
        let mut peer = start_peer(
            "a_peer_killed_while_its_pages_are_installed_ends_its_session_only",
            &dir.path().join("s"),
        );
        let Notice::SessionStarted(info) = notices.recv_timeout(DEADLINE).unwrap() else {
            panic!("not started")
        };
        let end = Instant::now() + DEADLINE;
        while info.stats.snapshot().faults_installed < 200 + 100 * round {
            assert!(Instant::now() < end, "{:?}", info.stats.snapshot());
            std::thread::yield_now();
        }
        let killed = Instant::now();
        peer.kill().unwrap();
        let notice = notices.recv_timeout(DEADLINE).unwrap();
        fastest = fastest.min(killed.elapsed());
        let Notice::SessionEnded { end, id } = notice else { panic!("{notice:?}") };
        assert_eq!((id, end.reason), (info.id, EndReason::PeerExited), "{:?}", end.error);
        assert!(end.error.is_none() && info.stats.snapshot().faults_installed < PEER_PAGES as u64);
        peer.wait().unwrap();
    }

    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
    assert!(read(&mapping, 0, PAGES * PAGE) == bytes[..PAGES * PAGE]);
    pager.close_session(own.id, Rest::Zero);
    assert!(matches!(notices.recv_timeout(DEADLINE).unwrap(), Notice::SessionEnded { .. }));
}

#[test]
fn a_server_without_free_descriptors_says_so_and_goes_on_when_there_are() {
    let test = "a_server_without_free_descriptors_says_so_and_goes_on_when_there_are";
    alone::alone(test, Duration::from_secs(60), || {
        let bytes = image(PAGES);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        let notices = server(&pager, &path, &bytes);
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
        setrlimit(Resource::RLIMIT_NOFILE, open + 8, hard).unwrap();

        let mut clients = Vec::new();
        while let Ok(client) = UnixStream::connect(&path) {
            clients.push(client);
        }
        let notice = notices.recv_timeout(DEADLINE).unwrap();
        let Notice::Rejected { error, .. } = &notice else { panic!("{notice:?}") };
        assert_eq!(error.code(), "ERR_UFFD_EXHAUSTED", "{error}");

        drop(clients);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        let mapping = Arc::new(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap());
        let Some(_connection) = hand_over(&path, &mapping) else { return };
        // The connections that said nothing are turned away first.
        let info = loop {
            match notices.recv_timeout(DEADLINE).unwrap() {
                Notice::SessionStarted(info) => break info,
                Notice::Rejected { .. } => {}
                other => panic!("{other:?}"),
            }
        };
        assert!(read(&mapping, 0, PAGES * PAGE) == bytes);
        pager.close_session(info.id, Rest::Zero);
        while !matches!(notices.recv_timeout(DEADLINE).unwrap(), Notice::SessionEnded { .. }) {}
    });
}
