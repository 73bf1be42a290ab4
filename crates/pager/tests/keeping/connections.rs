//! Connections whose process was not served yet when their pager was killed.
#![allow(unreachable_pub, reason = "a module of a test program is its own crate's")]

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;

use nix::errno::Errno;
use pager::{
    EndReason, FailurePolicy, Image, KeptConnection, Listener, Notice, Pager, PagerError, PagerOptions, Rest,
    WorkingSet,
};
use uffd::{Modes, Userfaultfd, fd_passing};

use crate::memory::page;
use crate::support::area::{Area, Made, all_events, ended, new_uffd, register, started};
use crate::support::kept::inside::server_options;
use crate::support::kept::{PagerProcess, Source, Told};
use crate::support::{DEADLINE, PAGE, finish, image, told};

const PAGES: usize = 64;

/// What Firecracker says of this memory.
pub fn handshake_of(area: Area) -> String {
    format!(
        r#"[{{"base_host_virt_addr":{},"size":{},"offset":0,"page_size":{PAGE}}}]"#,
        area.address,
        area.len()
    )
}

/// Memory that is handed over to a server in a process of its own, and a thread that waits for its fourth page.
struct Handing {
    area: Area,
    uffd: Userfaultfd,
    waiting: Receiver<Result<Vec<u8>, Errno>>,
    process: PagerProcess,
    socket: UnixStream,
    connection: KeptConnection,
    kept: OwnedFd,
    dir: tempfile::TempDir,
}

/// Connects, and says nothing so far.
fn handing(source: Option<Source>) -> Option<Handing> {
    let uffd = new_uffd(all_events())?;
    let area = Area::new(Made::Private, PAGES);
    register(&uffd, area, Modes::MISSING);
    let waiting = area.part(4, 1).peek();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let process = PagerProcess::start("pager_process");
    process.listen(path.clone(), source);
    let socket = UnixStream::connect(&path).unwrap();
    let (connection, kept) = process.kept_connection();
    Some(Handing { area, uffd, waiting, process, socket, connection, kept, dir })
}

impl Handing {
    fn say(&self, words: &str, with_uffd: bool) {
        let uffd = self.uffd.as_fd();
        let fds = if with_uffd { &[uffd][..] } else { &[] };
        fd_passing::send(self.socket.as_fd(), words.as_bytes(), fds).unwrap();
    }

    fn asked(&self) {
        let Told::Asking { id } = self.process.told().0 else { panic!("nobody is asked") };
        assert_eq!(id, self.connection.id);
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("successor")
    }
}

/// A pager of this process with a server of its own.
fn successor(handing: &Handing, source: Option<Source>) -> (Pager, u64, Receiver<Notice>) {
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();
    let listener = Listener::bind(&handing.path(), None).unwrap();
    let server = pager.serve_firecracker(listener, server_options(source), observer);
    (pager, server, notices)
}

fn the_image() -> Image {
    Image {
        label: String::new(),
        source: Source::AtHand(PAGES).open(),
        policy: FailurePolicy::Poison,
        window: None,
        fill: pager::FillOptions::default(),
        source_timeout: pager::SOURCE_TIMEOUT,
        working_set: WorkingSet::default(),
    }
}

#[test]
fn a_process_whose_image_was_being_asked_for_is_asked_for_again_under_its_number_and_served() {
    let Some(handing) = handing(None) else { return };
    handing.say(&handshake_of(handing.area), true);
    handing.asked();
    let (pager, server, notices) = successor(&handing, None);
    let Handing { area, waiting, process, connection, kept, socket, .. } = handing;
    process.kill();

    pager.resume_connection(connection.id, kept, server);

    let Notice::Asking { id, peer, regions, .. } = notices.recv_timeout(DEADLINE).unwrap() else {
        panic!("nobody is asked")
    };
    assert_eq!((id, peer.pid), (connection.id, std::process::id() as i32));
    assert_eq!(regions[0].address, area.address);
    pager.answer(id, Ok(the_image()));
    assert_eq!(started(&notices).id, connection.id);
    assert!(finish(&waiting).unwrap() == page(&image(PAGES), 4));
    assert!(area.read() == image(PAGES));
    drop(socket);
    pager.close_session(id, Rest::Poison);
    assert_eq!(ended(&notices, id).reason, EndReason::Closed);
}

#[test]
fn a_handshake_of_which_a_part_was_read_is_read_from_its_beginning() {
    let Some(handing) = handing(Some(Source::AtHand(PAGES))) else { return };
    let hello = handshake_of(handing.area);
    let (first, rest) = hello.split_at(30);
    let (second, third) = rest.split_at(10);
    // Its descriptor is with what was read, in the middle of it.
    handing.say(first, false);
    handing.say(second, true);
    let read_by = |process: &PagerProcess| {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap();
        fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
            .any(|is| is.as_os_str() == "anon_inode:[userfaultfd]")
    };
    let deadline = std::time::Instant::now() + DEADLINE;
    while !read_by(&handing.process) {
        assert!(std::time::Instant::now() < deadline, "it reads nothing");
        std::thread::yield_now();
    }
    let (pager, server, notices) = successor(&handing, Some(Source::AtHand(PAGES)));
    handing.process.signal(libc::SIGKILL);
    handing.say(third, false);
    let Handing { area, waiting, process, connection, kept, .. } = handing;
    process.kill();

    pager.resume_connection(connection.id, kept, server);

    assert_eq!(started(&notices).id, connection.id);
    assert!(finish(&waiting).unwrap() == page(&image(PAGES), 4));
    assert!(area.part(9, 1).read() == page(&image(PAGES), 9));
    pager.close_session(connection.id, Rest::Poison);
}

#[test]
fn a_process_that_nobody_can_serve_any_more_meets_the_policy_of_its_connection() {
    let Some(handing) = handing(None) else { return };
    handing.say(&handshake_of(handing.area), true);
    handing.asked();
    let Handing { area, uffd, waiting, process, connection, kept, .. } = handing;
    process.kill();
    drop(uffd);
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();

    let why = PagerError::Internal("nobody is left".to_owned());
    pager.fail_connection(connection.id, kept, FailurePolicy::Poison, why, observer);

    assert_eq!(finish(&waiting), Err(Errno::EFAULT));
    assert_eq!(finish(&area.part(60, 1).peek()), Err(Errno::EFAULT));
    let Notice::Rejected { asked, peer, error } = notices.recv_timeout(DEADLINE).unwrap() else {
        panic!("nobody is told")
    };
    assert_eq!((asked, peer.map(|peer| peer.uid)), (Some(connection.id), Some(area_owner())));
    assert!(error.to_string().contains("nobody is left"), "{error}");
    assert!(matches!(notices.recv_timeout(DEADLINE), Ok(Notice::ServerClosed)));
}

fn area_owner() -> u32 {
    nix::unistd::Uid::effective().as_raw()
}

#[test]
fn a_connection_whose_server_is_gone_is_turned_away() {
    let Some(handing) = handing(None) else { return };
    handing.say(&handshake_of(handing.area), true);
    handing.asked();
    let Handing { waiting, process, connection, kept, .. } = handing;
    process.kill();
    let pager = Pager::start(&PagerOptions::default()).unwrap();

    pager.resume_connection(connection.id, kept, u64::MAX);

    assert_eq!(finish(&waiting), Err(Errno::EFAULT));
}

#[test]
fn what_was_said_on_a_connection_is_taken_out_of_it_once_its_session_is_kept() {
    let Some(handing) = handing(Some(Source::AtHand(PAGES))) else { return };
    let hello = handshake_of(handing.area);
    let (first, second) = hello.split_at(20);
    handing.say(first, true);
    handing.say(second, false);
    let kept = handing.process.kept();
    assert_eq!(kept.session.id, handing.connection.id);
    assert!(matches!(handing.process.told().0, Told::ForgetConnection { .. }));

    let left = fd_passing::recv(handing.kept.as_fd(), &mut [0; 64], 8);

    assert!(matches!(left, Err(fd_passing::FdPassingError::WouldBlock)), "{left:?}");
    assert_eq!(handing.process.started().0, kept.session.id);
    assert!(finish(&handing.waiting).unwrap() == page(&image(PAGES), 4));
}

#[test]
fn a_connection_that_is_turned_away_is_forgotten_when_it_is_over() {
    let Some(handing) = handing(None) else { return };
    handing.say("no handshake", false);

    let (Told::ForgetConnection { id }, Told::Refused { code, .. }) =
        (handing.process.told().0, handing.process.told().0)
    else {
        panic!("it is kept on")
    };

    assert_eq!((id, code.as_str()), (handing.connection.id, "ERR_UFFD_PROTOCOL"));
}
