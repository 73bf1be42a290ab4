//! The pager as its owner sees it: a thread to which one sends requests.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use uffd::Userfaultfd;
use uffd::errno_of;
use uffd::liveness::PidFd;

use crate::address_map::{AddressMap, Region};
use crate::ahead::{DeliverPopulated, PopulateOptions};
use crate::error::PagerError;
use crate::event_loop::EventLoop;
use crate::fill::FillOptions;
use crate::holding::Backing;
use crate::keep::{Keeper, Successor, To};
use crate::left::LeftBehind;
use crate::mailbox::Mailbox;
use crate::modes::{Minor, SessionModes, protect};
use crate::notice::Observer;
use crate::owed::Owed;
use crate::placement::pin;
use crate::policy::{FailurePolicy, Rest};
use crate::server::{Image, Server, ServerOptions};
use crate::session::Parts;
use crate::socket::Listener;
use crate::source::PageSource;
use crate::supervise::{Peer, Supervised, check_policy};
use crate::sync::Bell;
use crate::taking_over::TakingOver;
use crate::trace::WorkingSet;
use crate::tracking::{DeliverDirty, DirtyPages, DirtyReply, Tracking};
use crate::workers::Completion;

/// How a pager runs.
#[derive(Debug, Clone)]
pub struct PagerOptions {
    /// The CPU its event loop is pinned to. Worth it only where the faulting threads are pinned too; never chosen
    /// automatically. Default: wherever the scheduler puts it.
    pub cpu: Option<usize>,
    /// Threads that read sources which can block. Started when needed; a fifth of them only for what somebody waits for.
    /// Default: 20.
    pub workers: usize,
    /// Who is handed every session, so that another process can go on with it when this one is gone. Default: nobody.
    pub keeper: Option<Arc<dyn Keeper>>,
}

impl Default for PagerOptions {
    fn default() -> Self {
        Self { cpu: None, workers: 20, keeper: None }
    }
}

/// Memory that is served without a handshake.
#[derive(Debug)]
pub struct SessionOptions {
    /// What a keeper is told about where its memory comes from. Default: empty.
    pub label: String,
    /// What is registered with the uffd, and where its bytes are in the source.
    pub regions: Vec<Region>,
    /// Bytes of a page: the system's, or of the huge pages that the memory is made of.
    pub page_size: u64,
    /// Where missing pages come from.
    pub source: Arc<dyn PageSource>,
    /// What happens when they cannot be had.
    pub policy: FailurePolicy,
    /// As in [`ServerOptions::window`].
    pub window: Option<u64>,
    /// What is brought without a fault. Default: nothing.
    pub fill: FillOptions,
    /// How long the source may take for a read that it cannot answer at once. Then the session ends as stalled.
    pub source_timeout: Duration,
    /// The process whose memory it is; `None` for this one, and for one that cannot be watched.
    pub process: Option<PidFd>,
    /// Which faults it answers. Default: those of missing pages.
    pub modes: SessionModes,
    /// Whether its working set is recorded, or an earlier one replayed.
    pub working_set: WorkingSet,
    /// The thread by which alone [`FailurePolicy::Hold`] of this process's own memory ends: if it waits itself, the program
    /// ends with an explanation.
    pub owner: Option<u32>,
    /// What is to outlive the session: the mapping, where it is one of this process.
    pub backing: Option<Backing>,
}

/// Memory that can be served: see [`SessionOptions::prepare`].
pub struct Prepared {
    options: SessionOptions,
    map: AddressMap,
    minor: Option<Minor>,
    tracking: Option<Tracking>,
    /// The source is never asked.
    all_there: bool,
}

impl SessionOptions {
    /// Missing pages of these regions come from this source, in windows around faults; what cannot be had is poisoned. The source
    /// may take 30 s for a read.
    #[must_use]
    pub fn new(regions: Vec<Region>, page_size: u64, source: Arc<dyn PageSource>) -> Self {
        Self {
            label: String::new(),
            regions,
            page_size,
            source,
            policy: FailurePolicy::Poison,
            window: None,
            fill: FillOptions::default(),
            source_timeout: SOURCE_TIMEOUT,
            process: None,
            modes: SessionModes::default(),
            working_set: WorkingSet::default(),
            owner: None,
            backing: None,
        }
    }

    /// What can fail of [`Pager::adopt`], with a userfaultfd that stays the caller's: who waits for its memory goes on
    /// waiting, and the caller can do something else about it.
    ///
    /// # Errors
    ///
    /// Those of [`Pager::adopt`].
    pub fn prepare(mut self, uffd: &Userfaultfd) -> Result<Prepared, PagerError> {
        let map = AddressMap::new(&self.regions, self.page_size, self.source.size())?;
        self.modes.check(uffd)?;
        if self.process.is_some() || uffd.origin().is_none() {
            check_policy(self.policy, self.process.as_ref(), uffd)?;
        }
        if let Some(replay) = &self.working_set.replay {
            replay.fits(self.source.size())?;
        }
        let all_there = !self.modes.fill();
        let minor = |memory| Minor::new(memory, &self.regions, &map, self.modes.missing);
        let minor = self.modes.minor.take().map(minor).transpose()?;
        let tracking = if self.modes.write_protect {
            protect(uffd, &self.regions)?;
            Some(Tracking::new(map.pages(), map.page_size()))
        } else {
            None
        };
        Ok(Prepared { options: self, map, minor, tracking, all_there })
    }
}

/// How long a source may take, unless told otherwise.
pub const SOURCE_TIMEOUT: Duration = Duration::from_secs(30);

/// What the event loop is asked to do.
pub(crate) enum Message {
    Serve(Box<Server>),
    Adopt(Box<(Parts, Arc<dyn Observer>)>),
    TakeOver(Box<(Parts, TakingOver, Successor)>),
    Connection(u64, OwnedFd, To),
    Answer {
        id: u64,
        image: Result<Image, PagerError>,
    },
    CloseServer {
        id: u64,
        rest: Rest,
    },
    CloseSession {
        id: u64,
        rest: Rest,
    },
    ConfigureServer {
        id: u64,
        options: Box<ServerOptions>,
    },
    DrainServer {
        id: u64,
    },
    TakeDirty {
        id: u64,
        most: usize,
        answer: Owed<DirtyPages>,
    },
    Populate {
        id: u64,
        request: u64,
        options: PopulateOptions,
        answer: Owed<()>,
    },
    Detach {
        id: u64,
        answer: Owed<()>,
    },
    CancelPopulate {
        id: u64,
        request: u64,
    },
    AbandonServer {
        id: u64,
    },
    Hold {
        id: u64,
        answer: Owed<()>,
    },
    Resume {
        id: u64,
        source: Option<Arc<dyn PageSource>>,
        answer: Owed<()>,
    },
    Decide {
        id: u64,
        policy: FailurePolicy,
    },
    Completed(Completion),
    StopRecording {
        id: u64,
        answer: Owed<()>,
    },
    AwaitReplay {
        id: u64,
        answer: Owed<()>,
    },
    /// The thread of a session's recording has ended.
    Recorded {
        id: u64,
    },
    Then(Box<dyn FnOnce() + Send>),
    /// Closes everything and ends.
    Stop,
}

/// One native event loop and its workers, serving any number of sessions.
///
/// Its methods may be called on any thread and never wait for a fault. Dropping it closes what is still open (pages
/// still missing are poisoned) and joins the thread.
pub struct Pager {
    pub(crate) mailbox: Mailbox<Message>,
    thread: Option<JoinHandle<()>>,
    /// What is left of processes that sessions are taken over from.
    pub(crate) left: Mutex<LeftBehind>,
}

/// Ids of servers and sessions: never used again, so that a stale one reaches nothing.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

pub(crate) fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// Ids up to this one are another's.
pub(crate) fn skip_ids(up_to: u64) {
    NEXT_ID.fetch_max(up_to.saturating_add(1), Ordering::Relaxed);
}

impl Pager {
    /// Starts the event loop's thread.
    ///
    /// # Errors
    ///
    /// [`PagerError::System`] when descriptors or threads have run out, or `cpu` is none of this machine's.
    pub fn start(options: &PagerOptions) -> Result<Self, PagerError> {
        let failed = |syscall| move |errno| PagerError::System { syscall, errno };
        let (mailbox, inbox) = Mailbox::new(Bell::new().map_err(failed("eventfd"))?);
        let event_loop = EventLoop::new(inbox, mailbox.clone(), options.workers, options.keeper.clone())?;
        // Pinning happens on the new thread; it answers before anything is served.
        let (started, answer) = channel();
        let cpu = options.cpu;
        let thread = std::thread::Builder::new()
            .name("uffd-pager".into())
            .spawn(move || {
                let pinned = cpu.map_or(Ok(()), pin);
                let run = pinned.is_ok();
                let _ = started.send(pinned);
                if run {
                    event_loop.run();
                }
            })
            .map_err(|error| PagerError::System { syscall: "clone", errno: errno_of(&error) })?;
        let pager = Self { mailbox, thread: Some(thread), left: Mutex::default() };
        answer.recv().unwrap_or(Err(Errno::ECHILD)).map_err(failed("sched_setaffinity"))?;
        Ok(pager)
    }

    /// Takes Firecracker's snapshot handshakes from `listener` and serves each process that makes one. The id names the
    /// server in [`Pager::close_server`].
    pub fn serve_firecracker(
        &self,
        listener: Listener,
        options: ServerOptions,
        observer: Arc<dyn Observer>,
    ) -> u64 {
        let id = next_id();
        self.mailbox.send(Message::Serve(Box::new(Server::new(id, listener, options, observer))));
        id
    }

    /// Serves memory that is registered with a uffd: this process's own (made by [`uffd::Factory`]), or that of the process
    /// the uffd came from. The id names the session in [`Pager::close_session`]; its observer hears of its end.
    ///
    /// The uffd's events are the pager's to read from now on. If it has EVENT_FORK on and the memory is this process's
    /// own, fork(3) can wait for ever: the pager allocates.
    ///
    /// # Errors
    ///
    /// [`PagerError::Region`], [`PagerError::Protocol`] for regions that cannot be, or that the source does not cover;
    /// [`PagerError::System`] when no descriptor is free; [`PagerError::Unsupported`] and [`PagerError::Adopt`] for modes
    /// that cannot be, [`PagerError::Kernel`] when protecting is refused. What was protected until then stays so.
    pub fn adopt(
        &self,
        uffd: Userfaultfd,
        options: SessionOptions,
        observer: Arc<dyn Observer>,
    ) -> Result<u64, PagerError> {
        let prepared = options.prepare(&uffd)?;
        Ok(self.adopt_prepared(uffd, prepared, observer))
    }

    /// [`Pager::adopt`] of what [`SessionOptions::prepare`] has found good, with the userfaultfd it was asked about.
    pub fn adopt_prepared(&self, uffd: Userfaultfd, prepared: Prepared, observer: Arc<dyn Observer>) -> u64 {
        let Prepared { options, map, minor, tracking, all_there } = prepared;
        let id = next_id();
        let own = options.process.is_none() && uffd.origin().is_some();
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let pid = options.process.as_ref().map_or(std::process::id() as i32, PidFd::pid);
        let parts = Parts {
            id,
            label: options.label,
            uffd,
            map,
            source: options.source,
            policy: options.policy,
            window: options.window,
            fill: options.fill,
            peer: Peer { pid, uid, gid },
            source_timeout: options.source_timeout,
            process: options.process.map(Supervised::new),
            parent: None,
            minor,
            tracking,
            all_there,
            own,
            connection: None,
            working_set: options.working_set,
            owner: options.owner,
            backing: options.backing,
        };
        self.mailbox.send(Message::Adopt(Box::new((parts, observer))));
        id
    }

    pub(crate) fn send(&self, message: Message) {
        self.mailbox.send(message);
    }

    /// Answers [`Notice::Asking`]: the image that the process is served from from now on, or why it gets none and is turned
    /// away. An answer that comes too late is dropped.
    ///
    /// [`Notice::Asking`]: crate::Notice::Asking
    pub fn answer(&self, id: u64, image: Result<Image, PagerError>) {
        self.mailbox.send(Message::Answer { id, image });
    }

    /// Stops listening at once and closes the server's sessions; its observer is told when the last is over.
    pub fn close_server(&self, id: u64, rest: Rest) {
        self.mailbox.send(Message::CloseServer { id, rest });
    }

    /// Stops listening at once and lets everything that has begun go on; the server's observer is told when the last session
    /// is over. Whoever has connected until then is still served.
    pub fn drain_server(&self, id: u64) {
        self.mailbox.send(Message::DrainServer { id });
    }

    /// Closes a server whose owner goes away without having done so: its sessions meet their failure policy.
    pub fn abandon_server(&self, id: u64) {
        self.mailbox.send(Message::AbandonServer { id });
    }

    /// Tells what was written to since the session began or since the last call, up to `most` ranges, and protects it again.
    ///
    /// Who reads the memory after the answer sees every write that it stands for; a later write is in the next one. Pages
    /// that were discarded count as written to, in two answers, because the kernel announces it before they go. Never
    /// waits: the event loop gathers the answer between faults.
    #[must_use]
    pub fn take_dirty(&self, session: u64, most: usize) -> DirtyReply {
        let (reply, deliver) = DirtyReply::new();
        self.take_dirty_with(session, most, deliver);
        reply
    }

    /// [`Pager::take_dirty`], the answer going to `deliver` (see [`DirtyReply::wait`] for its errors).
    pub fn take_dirty_with(&self, session: u64, most: usize, deliver: DeliverDirty) {
        self.mailbox.send(Message::TakeDirty { id: session, most, answer: Owed::new(deliver) });
    }

    /// Brings pages that no fault has asked for, in the order of `options`, while no fault waits. `deliver` hears when none of
    /// them is missing any more; or [`PagerError::SessionOver`] when the session ends before, [`PagerError::Region`] of a
    /// range of which the session serves nothing, [`PagerError::Exhausted`] when 64 such requests are under way.
    ///
    /// `request` is what [`Pager::cancel_populate`] names it by: the caller's choice.
    pub fn populate(&self, session: u64, request: u64, options: PopulateOptions, deliver: DeliverPopulated) {
        self.mailbox.send(Message::Populate { id: session, request, options, answer: Owed::new(deliver) });
    }

    /// Gives up a request to populate; it is told that it is over.
    pub fn cancel_populate(&self, session: u64, request: u64) {
        self.mailbox.send(Message::CancelPopulate { id: session, request });
    }

    /// Ends a session whose memory is all there: it is unregistered (`UFFDIO_UNREGISTER`), and its process needs no pager any
    /// more. `deliver` hears that it ends, as [`EndReason::Detached`]; or [`PagerError::PagesMissing`], which leaves it as it was, and
    /// [`PagerError::SessionOver`].
    ///
    /// [`EndReason::Detached`]: crate::EndReason::Detached
    pub fn detach(&self, session: u64, deliver: DeliverPopulated) {
        self.mailbox.send(Message::Detach { id: session, answer: Owed::new(deliver) });
    }

    /// Ends the recording of a session's faults; `deliver` hears when its file is whole, or why there is none:
    /// [`PagerError::Unsupported`] for a session that is not recorded.
    pub fn stop_recording(&self, session: u64, deliver: DeliverPopulated) {
        self.mailbox.send(Message::StopRecording { id: session, answer: Owed::new(deliver) });
    }

    /// `deliver` hears when everything that a session replays has been brought, or is on its way to a fault;
    /// [`PagerError::Unsupported`] for a session that replays nothing.
    pub fn await_replay(&self, session: u64, deliver: DeliverPopulated) {
        self.mailbox.send(Message::AwaitReplay { id: session, answer: Owed::new(deliver) });
    }

    /// Closes a session; the observer of its server is told when it is over.
    pub fn close_session(&self, id: u64, rest: Rest) {
        self.mailbox.send(Message::CloseSession { id, rest });
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.mailbox.send(Message::Stop);
        if let Some(thread) = self.thread.take() {
            // The loop catches its own panics; there is nothing to learn from the result.
            let _ = thread.join();
        }
    }
}
