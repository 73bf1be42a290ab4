//! The holder: keeps descriptors, and sees to it that there is a daemon. It touches no fault while the daemon lives, and
//! does nothing that could fail for reasons of a client.

mod custody;
mod hearing;
mod journal;
mod listening;
mod notify;
mod open_file;
mod restoring;
mod stash;
mod store;
mod upgrading;
mod watchdog;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pager::Listener;
use serde_json::Value;
use uffd::liveness::{PidFd, started_at};

use crate::args::Options;
use crate::channel::{Channel, ChannelError, Go, Message};
use crate::confine::confine_holder;
use crate::control::LISTENER;
use crate::kept::Kept;
use crate::running::{NotStarted, Running};
use crate::signals::Signals;

use custody::Custody;
pub(crate) use custody::remember_end;
use hearing::Heard;
use listening::Passed;
use notify::Notify;
pub(crate) use open_file::same_open_file;
use stash::StartedDaemon;
use upgrading::Executables;
use watchdog::Watchdog;

/// Starts within this time are counted.
const STORM: Duration = Duration::from_secs(10);
/// After so many within that time there is no other: what kills daemons would kill it, too.
const MOST_STARTS: usize = 32;
/// How long a daemon may take until it serves; one that hangs in what was kept is no better than one that dies of it.
const STARTING: Duration = Duration::from_secs(10);
/// Between attempts to start one.
const RESTING: u16 = 20;
/// How long the daemon of an earlier holder may take to be gone once it was killed.
const PREDECESSOR: Duration = Duration::from_secs(1);

/// How a daemon ended.
enum Ended {
    InOrder,
    /// It was ended, so that another executable takes its place.
    Upgrade,
    /// The other executable did not come to serve.
    NotUpgraded(String),
    Died(String),
    /// Nor can another be started.
    NoOther(String),
}

struct Holder {
    listener: Listener,
    go: Go,
    custody: Custody,
    watchdog: Option<Watchdog>,
    executables: Executables,
    starts: VecDeque<Instant>,
    /// Started already, for when this one dies.
    spare: Option<Running>,
    told_ready: bool,
    told_stopping: bool,
    /// It was told to end.
    stopping: bool,
}

/// Serves until it is told to stop.
///
/// # Errors
///
/// Why it cannot begin, or cannot go on.
pub(crate) fn run(options: &Options) -> Result<(), String> {
    let signals = Signals::take().map_err(|errno| errno.to_string())?;
    // The daemon's heir outlives the daemon, and is to be waited for.
    let _ = set_child_subreaper(true);
    // Before the first thread and the first client: descriptors are what this is made of.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let Passed { listener, stored } = Passed::take(options)?;
    confine_holder(options.confine, options.socket.as_deref());
    let (custody, before) = Custody::restore(Notify::from_environment(), stored);
    if let Some(before) = before {
        end_predecessor(before);
    }
    let watchdog = Watchdog::from_environment();
    let mut holder = Holder {
        listener,
        go: Go {
            epoch: before.map_or(0, |before| before.epoch),
            takeover: options.takeover,
            holder: std::process::id() as i32,
            allow: options.allow.clone(),
            confine: options.confine,
            stored: custody.is_stored(),
            lonely_for: None,
            alive_every: watchdog.as_ref().map(|watchdog| watchdog.interval().as_millis() as u64),
            upgrades: Some(Vec::new()),
        },
        custody,
        watchdog,
        executables: Executables::default(),
        starts: VecDeque::new(),
        spare: None,
        told_ready: false,
        told_stopping: false,
        stopping: false,
    };
    if before.is_some() && !options.takeover {
        holder.fail_all("the holder has died, and nothing is to be taken over (--takeover off)");
    }
    let outcome = holder.run(&signals);
    if outcome.is_ok() || holder.stopping {
        holder.custody.end();
    } else {
        holder.custody.leave();
    }
    outcome
}

/// A daemon that an earlier holder has started and that still runs: its sessions are another's from now on.
fn end_predecessor(StartedDaemon { pid, started, .. }: StartedDaemon) {
    let Ok(process) = PidFd::open(pid) else { return };
    // Its number may be another's by now.
    if started.is_none() || started_at(pid) != started {
        return;
    }
    crate::log(format_args!("the daemon of an earlier holder (process {pid}) still ran: it is replaced"));
    let _ = process.send_signal(libc::SIGKILL);
    let _ = process.wait(PREDECESSOR);
}

fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

impl Holder {
    fn run(&mut self, signals: &Signals) -> Result<(), String> {
        loop {
            let why = match self.serve(signals) {
                Ok(Ended::InOrder) => return Ok(()),
                Ok(Ended::Upgrade) => continue,
                Ok(Ended::NotUpgraded(why)) => {
                    crate::log(format_args!("{why}: the old one does again"));
                    continue;
                }
                Ok(Ended::NoOther(why)) => {
                    self.fail_all(&why);
                    return Err(why);
                }
                Ok(Ended::Died(why)) | Err(why) => why,
            };
            crate::log(format_args!("{why}"));
            let gone = self.stopping || !self.may_start();
            if gone || !self.go.takeover {
                self.fail_all(&why);
            }
            if self.stopping {
                return Err("the daemon died while it was to end in order".to_owned());
            }
            if gone {
                return Err(format!("{MOST_STARTS} daemons have died within {} s", STORM.as_secs()));
            }
        }
    }

    fn fail_all(&mut self, why: &str) {
        let ends = self.custody.fail_all(why);
        crate::log(format_args!("{ends} sessions were put through their failure policy"));
    }

    /// The life of one daemon.
    fn serve(&mut self, signals: &Signals) -> Result<Ended, String> {
        let mut running = match self.start_patiently(signals) {
            Ok(running) => running,
            Err(why) => return Ok(Ended::NoOther(why)),
        };
        let status = self.watch(&mut running, signals)?;
        if running.stopping && status.success() {
            return Ok(Ended::InOrder);
        }
        if running.upgrading {
            return Ok(Ended::Upgrade);
        }
        let how = ending(status);
        if !running.serving
            && let Some(executable) = self.gives_up_executable(&how)
        {
            return Ok(Ended::NotUpgraded(format!("{executable} did not come to serve ({how})")));
        }
        Ok(Ended::Died(format!("the daemon (process {}) died: {how}", running.process.pid())))
    }

    /// Whether another daemon may be started.
    fn may_start(&mut self) -> bool {
        self.starts.retain(|start| start.elapsed() < STORM);
        self.starts.len() < MOST_STARTS
    }

    /// Starts a daemon. What the system cannot do at this moment is tried again, as long as those who wait can be left waiting.
    fn start_patiently(&mut self, signals: &Signals) -> Result<Running, String> {
        let began = Instant::now();
        let mut told = false;
        loop {
            let error = match self.start() {
                Ok(running) => return Ok(running),
                Err(error) => error,
            };
            // Whoever has started this hears of it at once.
            let nobody_waits = !self.told_ready && self.custody.kept().is_empty();
            if nobody_waits || began.elapsed() >= STARTING {
                return Err(error.to_string());
            }
            if !std::mem::replace(&mut told, true) {
                crate::log(format_args!("{error}: it is tried again for {} s", STARTING.as_secs()));
            }
            self.pause(signals)?;
        }
    }

    /// Between attempts to start a daemon: signals and a service manager do not wait for that.
    fn pause(&mut self, signals: &Signals) -> Result<(), String> {
        let _ = poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], RESTING);
        if self.custody.notified().is_behind() {
            self.custody.notify().flush();
        }
        if self.watchdog.as_mut().is_some_and(Watchdog::is_due) {
            self.custody.notify().tell("WATCHDOG=1".to_owned(), None);
        }
        if signals.came() {
            self.stops();
            self.stopping = true;
            return Err("it was to end while there was no daemon".to_owned());
        }
        Ok(())
    }

    /// Starts a daemon and gives it everything.
    fn start(&mut self) -> Result<Running, NotStarted> {
        // Who has asked for it is gone with the daemon, and asks again.
        self.executables.candidate = None;
        let running = match self.spare.take() {
            Some(spare) => Running { since: Instant::now(), ..spare },
            None => self.start_any()?,
        };
        self.starts.push_back(Instant::now());
        self.go.epoch += 1;
        self.custody.daemon_started(self.go.epoch, running.process.pid());
        // One that dies of it is noticed by its end.
        let _ = self.hand_over(&running.channel);
        Ok(running)
    }

    /// Starts the next daemon. One that cannot be started now is started when it is needed.
    fn keep_spare(&mut self) {
        if !self.go.takeover || self.spare.is_some() || self.stopping {
            return;
        }
        self.spare = self.start_waiting(self.executables.current()).ok();
    }

    fn hand_over(&self, channel: &Channel) -> Result<(), ChannelError> {
        let listener = Message::Keep { key: LISTENER.to_owned(), value: Value::Null };
        channel.send(&listener, &[self.listener.as_fd()])?;
        for Kept { key, value, fds } in self.custody.kept() {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            channel.send(&Message::Keep { key: key.clone(), value: value.clone() }, &fds)?;
        }
        channel.send(&Message::Go(self.go.clone()), &[])
    }

    /// Keeps what the daemon gives, until it has ended.
    fn watch(&mut self, running: &mut Running, signals: &Signals) -> Result<ExitStatus, String> {
        let mut open = true;
        loop {
            let mut fds = vec![
                PollFd::new(running.process.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            ];
            if open {
                fds.push(PollFd::new(running.channel.as_fd(), PollFlags::POLLIN));
            }
            let spare = self.spare.as_ref().map(|spare| {
                fds.push(PollFd::new(spare.process.as_fd(), PollFlags::POLLIN));
                fds.len() - 1
            });
            fds.extend(self.executables.candidate());
            fds.extend(self.custody.notified().room().map(|room| PollFd::new(room, PollFlags::POLLOUT)));
            let lingering = fds.len();
            fds.extend(self.custody.lingering().iter().filter_map(process_of));
            let starting = (!running.serving).then(|| {
                // A millisecond is what poll(2) counts in.
                STARTING.saturating_sub(running.since.elapsed()).max(Duration::from_millis(1))
            });
            match poll(
                &mut fds,
                until([
                    starting,
                    self.custody.notified().again(),
                    self.watchdog.as_ref().map(Watchdog::left),
                    self.executables.left(),
                ]),
            ) {
                Ok(0) if !running.serving && running.since.elapsed() >= STARTING => {
                    running.process.send_signal(libc::SIGKILL).unwrap_or_default();
                }
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(format!("poll: {errno}")),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if self.custody.notified().is_behind() {
                self.custody.notify().flush();
            }
            if ready.iter().skip(lingering).any(|&ended| ended) {
                self.custody.linger_only(|kept| process_of(kept).is_none_or(|process| !has_ended(process)));
            }
            if spare.is_some_and(|at| ready.get(at) == Some(&true)) {
                crate::log(format_args!("the spare daemon has died: the next is started when it is needed"));
                self.spare = None;
            }
            self.look_at_candidate(running);
            if ready.get(1) == Some(&true) && signals.came() {
                self.stops();
                self.stopping = true;
                let _ = running.channel.send(&Message::Stop, &[]);
            }
            // What it said before its end counts.
            if open && ready.get(2) == Some(&true) {
                open = self.hear(running) != Heard::End;
            }
            let heard = ready.get(2) != Some(&true);
            if self.watchdog.as_mut().is_some_and(|watchdog| watchdog.look(running, heard)) {
                self.custody.notify().tell("WATCHDOG=1".to_owned(), None);
            }
            if ready.first() == Some(&true) {
                self.hear_the_last(running);
                return running.child.0.wait().map_err(|error| format!("wait: {error}"));
            }
        }
    }
}

/// The time until the first of these has passed.
fn until<const N: usize>(times: [Option<Duration>; N]) -> PollTimeout {
    let first = times.into_iter().flatten().min();
    first.map_or(PollTimeout::NONE, |first| PollTimeout::try_from(first).unwrap_or(PollTimeout::MAX))
}

/// The pidfd of a kept session, to be waited for.
fn process_of(kept: &Kept) -> Option<PollFd<'_>> {
    let has = kept.value["process"] == Value::Bool(true);
    kept.fds.get(2).filter(|_| has).map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
}

fn has_ended(process: PollFd<'_>) -> bool {
    poll(&mut [process], PollTimeout::ZERO) == Ok(1)
}
