//! Kinds of sessions: which are kept, and what of them; which are not.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use pager::{
    EndReason, Keeper, KeptConnection, KeptDescriptors, KeptSession, MinorMemory, Pager, PagerError,
    PagerOptions, Rest, SessionEnd, SessionModes, SessionOptions,
};
use uffd::{Features, Mapping, MappingKind, Modes, Userfaultfd, fd_passing};

use crate::connections::handshake_of;
use crate::memory::{Served, page, resume, served};
use crate::support::area::{Area, Made, all_events, ended, new_uffd, register, started};
use crate::support::children::{Steps, fork, turn};
use crate::support::kept::{PagerProcess, Source, Told};
use crate::support::{Bytes, DEADLINE, PAGE, finish, image, told};

const PAGES: usize = 64;

#[test]
fn a_session_of_a_handshake_is_kept_with_its_connection_and_its_process() {
    let Some(uffd) = new_uffd(all_events()) else { return };
    let area = Area::new(Made::Private, PAGES);
    register(&uffd, area, Modes::MISSING);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let process = PagerProcess::start("pager_process");
    process.listen(path.clone(), Some(Source::AtHand(PAGES)));
    let socket = UnixStream::connect(&path).unwrap();
    fd_passing::send(socket.as_fd(), handshake_of(area).as_bytes(), &[uffd.as_fd()]).unwrap();
    let (connection, _) = process.kept_connection();
    let kept = process.kept();
    assert_eq!((connection.id, connection.label.as_str()), (kept.session.id, "of the server"));
    let Told::ForgetConnection { id } = process.told().0 else { panic!("its connection is kept twice") };
    assert_eq!(id, connection.id);
    process.started();
    assert!(kept.connection.is_some() && kept.process.is_some() && kept.session.server.is_some());
    let own = std::process::id() as i32;
    assert_eq!((kept.session.label.as_str(), kept.session.peer.pid), ("of the server", own));
    area.part(3, 1).discard(Made::Private);
    process.kill();

    let resumed = resume(&kept, PAGES);

    assert!(area.part(3, 1).is_zero());
    assert!(area.part(4, 1).read() == page(&image(PAGES), 4));
    assert_eq!(resumed.info.peer, kept.session.peer);
    socket.set_nonblocking(true).unwrap();
    let hung_up = fd_passing::recv(socket.as_fd(), &mut [0; 8], 0);
    assert!(matches!(hung_up, Err(fd_passing::FdPassingError::WouldBlock)), "nobody has hung up");
    resumed.pager.close_session(kept.session.id, Rest::Poison);
    assert_eq!(ended(&resumed.notices, kept.session.id).reason, EndReason::Closed);
}

#[test]
fn writes_that_were_told_of_and_writes_that_were_not_are_told_of_by_the_successor() {
    let adjust = |session: &mut KeptSession| session.write_protect = true;
    let modes = Modes::MISSING | Modes::WRITE_PROTECT;
    let Some(served) = served(PAGES, all_events(), modes, adjust) else { return };
    let Served { area, bytes, process, kept, .. } = served;
    let at = |page: u64| area.address + page * PAGE as u64;
    area.part(2, 1).write(b"two");
    assert!(area.part(3, 1).read() == page(&bytes, 3));
    assert_eq!(process.take_dirty(kept.session.id), [at(2)]);
    area.part(5, 1).write(b"five");
    process.kill();

    let resumed = resume(&kept, PAGES);

    let dirty = || -> Vec<u64> {
        let told = resumed.pager.take_dirty(kept.session.id, 100).wait(DEADLINE).unwrap();
        let pages = told.ranges.iter().map(|range| (range.address..range.address + range.len).step_by(PAGE));
        pages.flatten().collect()
    };
    // Whether the answer about the second page has arrived is not known.
    assert_eq!(dirty(), [at(2), at(5)]);
    assert!(dirty().is_empty());
    area.part(3, 1).write(b"three");
    area.part(7, 1).write(b"seven");
    assert_eq!(dirty(), [at(3), at(7)]);
    assert_eq!(&area.part(5, 1).read()[..4], b"five");
    resumed.pager.close_session(kept.session.id, Rest::Poison);
}

#[test]
fn a_child_that_was_forked_is_kept_before_its_parent_goes_on_and_served_by_the_successor() {
    let _turn = turn();
    let features = all_events() | Features::EVENT_FORK;
    let Some(served) = served(PAGES, features, Modes::MISSING, |_| {}) else { return };
    let Served { area, bytes, process, kept, .. } = served;
    area.part(6, 1).discard(Made::Private);
    let steps = Steps::new();
    let wait = steps.waiter();
    let act = move || {
        wait();
        i32::from(!(area.holds(5, 5) && area.zero(6)))
    };
    // SAFETY: touches memory and makes bare system calls.
    let child = unsafe { fork(act) };
    let of_child = process.kept();
    assert_eq!(of_child.session.parent, Some(kept.session.id));
    assert!(of_child.process.is_none());
    process.started();
    process.kill();

    let parent = resume(&kept, PAGES);
    let resumed = resume(&of_child, PAGES);

    assert_eq!((parent.info.lost_children, resumed.info.parent), (0, Some(kept.session.id)));
    steps.step();
    assert_eq!(child.exit_code(), 0);
    assert!(area.part(5, 1).read() == page(&bytes, 5));
    assert!(area.part(6, 1).is_zero());
    parent.pager.close_session(kept.session.id, Rest::Poison);
}

#[test]
fn a_session_that_is_over_is_forgotten_after_its_userfaultfd_was_closed() {
    let Some(served) = served(PAGES, all_events(), Modes::MISSING, |_| {}) else { return };

    served.process.begin_to_close(served.kept.session.id);

    // That it has begun may be told before it is over, or after.
    let mut told =
        std::iter::repeat_with(|| served.process.told().0).filter(|told| !matches!(told, Told::Done { .. }));
    let Some(Told::Forget { id, reason, still_open }) = told.next() else { panic!("it is not forgotten") };
    assert_eq!((id, reason.as_str(), still_open), (served.kept.session.id, "closed", false));
    assert!(matches!(told.next(), Some(Told::Ended { .. })));
}

/// A keeper of this process: refuses, or notes what it is given.
#[derive(Debug, Default)]
struct Noting {
    refuses: bool,
    kept: Mutex<Vec<u64>>,
}

impl Keeper for Noting {
    fn keep(&self, session: &KeptSession, _: KeptDescriptors<'_>) -> Result<(), PagerError> {
        if self.refuses {
            return Err(PagerError::Exhausted("the holder has no descriptor left".to_owned()));
        }
        self.kept.lock().unwrap().push(session.id);
        Ok(())
    }

    fn forget(&self, _: u64, _: &SessionEnd, _: bool) {}

    fn keep_connection(&self, _: &KeptConnection, _: BorrowedFd<'_>) -> Result<(), PagerError> {
        Ok(())
    }

    fn forget_connection(&self, _: u64) {}
}

fn pager_with(keeper: &Arc<Noting>) -> Pager {
    let keeper: Arc<dyn Keeper> = Arc::<Noting>::clone(keeper);
    Pager::start(&PagerOptions { keeper: Some(keeper), ..PagerOptions::default() }).unwrap()
}

/// As if it came from elsewhere.
fn foreign(uffd: &Userfaultfd) -> Userfaultfd {
    Userfaultfd::adopt(uffd.as_fd().try_clone_to_owned().unwrap()).unwrap()
}

fn options_of(address: u64) -> SessionOptions {
    let region = pager::Region { address, len: (PAGES * PAGE) as u64, source_offset: 0 };
    SessionOptions::new(vec![region], PAGE as u64, Arc::new(Bytes(image(PAGES))))
}

#[test]
fn a_session_that_cannot_be_kept_meets_its_policy_for_that_reason() {
    let Some(uffd) = new_uffd(all_events()) else { return };
    let area = Area::new(Made::Private, PAGES);
    register(&uffd, area, Modes::MISSING);
    let pager = pager_with(&Arc::new(Noting { refuses: true, ..Noting::default() }));
    let (observer, notices) = told();
    let waiting = area.part(9, 1).peek();

    let id = pager.adopt(foreign(&uffd), options_of(area.address), observer).unwrap();

    let end = ended(&notices, id);
    assert_eq!(end.reason, EndReason::PagerLost);
    assert!(end.error.unwrap().to_string().contains("the holder has no descriptor left"));
    assert_eq!(finish(&waiting), Err(Errno::EFAULT));
}

#[test]
fn memory_of_the_pagers_own_process_is_not_kept_and_minor_faults_are_refused() {
    let (Some(uffd), Some(of_minor)) = (new_uffd(all_events()), new_uffd(Features::MINOR_SHMEM)) else {
        return;
    };
    let keeper = Arc::new(Noting::default());
    let pager = pager_with(&keeper);
    let area = Area::new(Made::Private, PAGES);
    register(&uffd, area, Modes::MISSING);
    let (observer, notices) = told();
    pager.adopt(uffd, options_of(area.address), observer).unwrap();
    started(&notices);

    let mapping = Mapping::new(PAGES * PAGE, MappingKind::Shared).unwrap();
    let modes = Modes::MISSING | Modes::MINOR;
    // SAFETY: no reference to the mapping exists.
    unsafe { of_minor.register(mapping.address(), mapping.len() as u64, modes) }.unwrap();
    let minor = Some(MinorMemory::of(&mapping).unwrap());
    let modes = SessionModes { minor, ..SessionModes::default() };
    let options = SessionOptions { modes, ..options_of(mapping.address()) };
    let (observer, notices) = told();
    let id = pager.adopt(foreign(&of_minor), options, observer).unwrap();

    let end = ended(&notices, id);
    assert!(matches!(end.error, Some(PagerError::Unsupported(_))), "{end:?}");
    assert!(keeper.kept.lock().unwrap().is_empty());
}
