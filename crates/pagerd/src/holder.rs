//! The holder: keeps descriptors, and sees to it that there is a daemon. It touches no fault while the daemon lives, and
//! does nothing that could fail for reasons of a client.

use std::collections::VecDeque;
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use pager::Listener;
use serde_json::{Value, json};
use uffd::liveness::PidFd;

use crate::args::Options;
use crate::channel::{Channel, ChannelError, Go, Message};
use crate::control::LISTENER;
use crate::keeping::END;
use crate::kept::Kept;
use crate::left::{self, LEFT};
use crate::policy;
use crate::running::Running;
use crate::signals::Signals;

/// Starts within this time are counted.
const STORM: Duration = Duration::from_secs(10);
/// After so many within that time there is no other: what kills daemons would kill it, too.
const MOST_STARTS: usize = 32;
/// How long a daemon may take until it serves; one that hangs in what was kept is no better than one that dies of it.
const STARTING: Duration = Duration::from_secs(10);
/// How long a daemon's heir may take. What it does takes less than a millisecond; a machine that stalls stalls it, too.
const HEIR: Duration = Duration::from_secs(1);
/// Ends of sessions that are kept for clients that come back.
const MOST_ENDS: usize = 256;

/// How a daemon ended.
enum Ended {
    InOrder,
    /// It was ended, so that another executable takes its place.
    Upgrade,
    Died(String),
}

/// What came of listening to a daemon.
#[derive(PartialEq, Eq)]
enum Heard {
    Something,
    Nothing,
    /// Nothing can come any more.
    End,
}

struct Holder {
    listener: Listener,
    go: Go,
    /// In the order in which they came: what lies over another came after it.
    kept: Vec<Kept>,
    /// Sessions that are over, and whose descriptors must stay until their process has ended.
    lingering: Vec<Kept>,
    /// In the place of this very executable.
    executable: Option<String>,
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
    let mut holder = Holder {
        listener: listener(options)?,
        go: Go {
            epoch: 0,
            takeover: options.takeover,
            holder: std::process::id() as i32,
            allow: options.allow.clone(),
            confine: options.confine,
        },
        kept: Vec::new(),
        lingering: Vec::new(),
        executable: None,
        starts: VecDeque::new(),
        spare: None,
        told_ready: false,
        told_stopping: false,
        stopping: false,
    };
    loop {
        let why = match holder.serve(&signals) {
            Ok(Ended::InOrder) => return Ok(()),
            Ok(Ended::Upgrade) => continue,
            Ok(Ended::Died(why)) | Err(why) => why,
        };
        crate::log(format_args!("{why}"));
        let gone = holder.stopping || !holder.may_start();
        if gone || !holder.go.takeover {
            let ends = policy::apply(&mut holder.kept, &mut holder.lingering, &why);
            crate::log(format_args!("{ends} sessions were put through their failure policy"));
        }
        if holder.stopping {
            return Err("the daemon died while it was to end in order".to_owned());
        }
        if gone {
            return Err(format!("{MOST_STARTS} daemons have died within {} s", STORM.as_secs()));
        }
    }
}

fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// The socket that clients connect to.
fn listener(options: &Options) -> Result<Listener, String> {
    let words = |error: pager::PagerError| error.to_string();
    if let Some(path) = &options.socket {
        let listener = Listener::bind(path, None).map_err(words)?;
        if !options.allow.is_empty() {
            // Who may reach it is said by its directory then, and who connects is asked.
            let mode = Permissions::from_mode(0o666);
            fs::set_permissions(path, mode)
                .map_err(|error| format!("chmod of {}: {error}", path.display()))?;
        }
        return Ok(listener);
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    match number("LISTEN_FDS").filter(|_| number("LISTEN_PID") == Some(std::process::id())) {
        Some(1) => {}
        None | Some(0) => {
            return Err("no socket: say --socket PATH, or start it by socket activation".to_owned());
        }
        Some(many) => return Err(format!("{many} sockets were passed (LISTEN_FDS); there can be one")),
    }
    const FIRST: i32 = 3;
    // SAFETY: only borrowed for the call below, which refuses what is no listening socket.
    let borrowed = unsafe { BorrowedFd::borrow_raw(FIRST) };
    Listener::check(borrowed).map_err(words)?;
    // SAFETY: it is open, and by the protocol of socket activation it is this process's.
    Listener::inherit(unsafe { OwnedFd::from_raw_fd(FIRST) }).map_err(words)
}

impl Holder {
    /// The life of one daemon.
    fn serve(&mut self, signals: &Signals) -> Result<Ended, String> {
        let mut running = self.start()?;
        let status = self.watch(&mut running, signals)?;
        if running.stopping && status.success() {
            return Ok(Ended::InOrder);
        }
        if running.upgrading {
            return Ok(Ended::Upgrade);
        }
        if !running.serving && self.executable.take().is_some() {
            return Ok(Ended::Died(
                "the new executable did not come to serve: the old one does again".to_owned(),
            ));
        }
        Ok(Ended::Died(format!("the daemon (process {}) died: {}", running.process.pid(), ending(status))))
    }

    /// Whether another daemon may be started.
    fn may_start(&mut self) -> bool {
        self.starts.retain(|start| start.elapsed() < STORM);
        self.starts.len() < MOST_STARTS
    }

    /// Starts a daemon and gives it everything.
    fn start(&mut self) -> Result<Running, String> {
        self.starts.push_back(Instant::now());
        self.go.epoch += 1;
        let running = match self.spare.take() {
            Some(spare) => Running { since: Instant::now(), ..spare },
            None => Running::start(self.executable.as_deref())?,
        };
        // One that dies of it is noticed by its end.
        let _ = self.hand_over(&running.channel);
        Ok(running)
    }

    /// Starts the next daemon, which does everything that does not depend on what it will be given, and waits for that. One that cannot be
    /// started now is started when it is needed.
    fn keep_spare(&mut self) {
        if !self.go.takeover || self.spare.is_some() || self.stopping {
            return;
        }
        let spare = Running::start(self.executable.as_deref());
        self.spare =
            spare.ok().filter(|spare| spare.channel.send(&Message::Prepare(self.go.confine), &[]).is_ok());
    }

    fn hand_over(&self, channel: &Channel) -> Result<(), ChannelError> {
        let listener = Message::Keep { key: LISTENER.to_owned(), value: Value::Null };
        channel.send(&listener, &[self.listener.as_fd()])?;
        for Kept { key, value, fds } in &self.kept {
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
            let lingering = fds.len();
            fds.extend(self.lingering.iter().filter_map(process_of));
            let timeout = if running.serving {
                PollTimeout::NONE
            } else {
                let left = STARTING.saturating_sub(running.since.elapsed()).as_millis();
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            };
            match poll(&mut fds, timeout) {
                Ok(0) if !running.serving => running.process.send_signal(libc::SIGKILL).unwrap_or_default(),
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(format!("poll: {errno}")),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if ready.iter().skip(lingering).any(|&ended| ended) {
                self.lingering.retain(|kept| process_of(kept).is_none_or(|process| !has_ended(process)));
            }
            if spare.is_some_and(|at| ready.get(at) == Some(&true)) {
                crate::log(format_args!("the spare daemon has died: the next is started when it is needed"));
                self.spare = None;
            }
            if ready.get(1) == Some(&true) && signals.came() {
                self.stops();
                self.stopping = true;
                let _ = running.channel.send(&Message::Stop, &[]);
            }
            // What it said before its end counts.
            if open && ready.get(2) == Some(&true) {
                open = self.hear(running) != Heard::End;
            }
            if ready.first() == Some(&true) {
                self.hear_the_last(running);
                return running.child.0.wait().map_err(|error| format!("wait: {error}"));
            }
        }
    }

    /// Takes what the daemon that is dead has said, and what its heir says, which has its end of the line until it ends.
    fn hear_the_last(&mut self, running: &mut Running) {
        let until = Instant::now() + HEIR;
        let mut late = false;
        loop {
            match self.hear(running) {
                Heard::Something => {}
                Heard::End => break,
                Heard::Nothing if late => break,
                Heard::Nothing => {
                    let left = until.saturating_duration_since(Instant::now()).as_millis();
                    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
                    let mut fds = [PollFd::new(running.channel.as_fd(), PollFlags::POLLIN)];
                    late = matches!(poll(&mut fds, timeout), Ok(0));
                }
            }
        }
        let Some(heir) = running.heir.take() else { return };
        if late {
            crate::log(format_args!("the daemon's heir did nothing for {} ms", HEIR.as_millis()));
            let _ = heir.send_signal(libc::SIGKILL);
        }
        // It is this process's child since the daemon's end. Where it is not, another has waited for it; where that was before
        // it was told of here, it has no number, and -1 would be any child: the daemon.
        if heir.pid() > 0 {
            let _ = waitpid(Pid::from_raw(heir.pid()), None);
        }
    }

    /// Takes one message.
    fn hear(&mut self, running: &mut Running) -> Heard {
        let (message, mut fds) = match running.channel.receive() {
            Ok(Some(came)) => came,
            Ok(None) => return Heard::Nothing,
            Err(ChannelError::Closed) => return Heard::End,
            Err(ChannelError::Failed(why)) => {
                crate::log(format_args!("a message of the daemon was not understood: {why}"));
                return Heard::Something;
            }
        };
        match message {
            Message::Keep { key, value } => {
                self.forget(&key);
                self.kept.push(Kept { key, value, fds });
            }
            Message::Forget { key } => self.forget(&key),
            Message::Ended { key, end, value, still_open } => self.ended(&key, end, value, still_open),
            Message::Serving => {
                running.serving = true;
                self.ready(running);
                self.keep_spare();
            }
            Message::Upgrade { executable } => {
                self.executable = Some(executable);
                self.spare = None;
                running.upgrading = true;
                // The same path as any other death, on purpose: there is no second way that could be wrong.
                let _ = running.process.send_signal(libc::SIGKILL);
            }
            Message::Stopping => {
                self.stops();
                running.stopping = true;
            }
            Message::Heir => running.heir = fds.pop().and_then(|fd| PidFd::from_fd(fd).ok()),
            Message::Left { fds: numbers, all } => {
                left::keep(&mut self.kept, running.process.pid(), &numbers, fds, all);
            }
            Message::TakenOver => self.kept.retain(|kept| !kept.key.starts_with(LEFT)),
            Message::Spilled { .. } | Message::Go(_) | Message::Prepare(_) | Message::Stop => {}
        }
        Heard::Something
    }

    /// Says to a service manager that it ends, unless that was said.
    fn stops(&mut self) {
        if !std::mem::replace(&mut self.told_stopping, true) {
            notify(b"STOPPING=1");
        }
    }

    fn forget(&mut self, key: &str) {
        self.kept.retain(|kept| kept.key != key);
    }

    fn ended(&mut self, key: &str, end: String, value: Value, still_open: bool) {
        if let Some(at) = self.kept.iter().position(|kept| kept.key == key) {
            let kept = self.kept.remove(at);
            if still_open {
                self.lingering.push(kept);
            }
        }
        remember_end(&mut self.kept, end, value);
    }

    /// Says once that clients can connect: to whoever started it, and to a service manager.
    fn ready(&mut self, running: &Running) {
        if std::mem::replace(&mut self.told_ready, true) {
            return;
        }
        let line = json!({
            "ready": true,
            "socket": self.listener.path(),
            "holder": std::process::id(),
            "daemon": running.process.pid(),
        });
        let mut stdout = std::io::stdout();
        let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
        notify(b"READY=1");
    }
}

/// Keeps how a session ended, and not too many of those.
pub(crate) fn remember_end(kept: &mut Vec<Kept>, key: String, value: Value) {
    let is_end = |kept: &Kept| kept.key.starts_with(END);
    if kept.iter().filter(|kept| is_end(kept)).count() >= MOST_ENDS
        && let Some(oldest) = kept.iter().position(is_end)
    {
        kept.remove(oldest);
    }
    kept.push(Kept { key, value, fds: Vec::new() });
}

/// The pidfd of a kept session, to be waited for.
fn process_of(kept: &Kept) -> Option<PollFd<'_>> {
    let has = kept.value["process"] == Value::Bool(true);
    kept.fds.get(2).filter(|_| has).map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
}

fn has_ended(process: PollFd<'_>) -> bool {
    poll(&mut [process], PollTimeout::ZERO) == Ok(1)
}

/// `sd_notify(3)`.
fn notify(state: &[u8]) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let name = name.into_encoded_bytes();
    let address = match name.split_first() {
        Some((b'@', rest)) => SocketAddr::from_abstract_name(rest),
        _ => SocketAddr::from_pathname(String::from_utf8_lossy(&name).as_ref()),
    };
    if let (Ok(address), Ok(socket)) = (address, UnixDatagram::unbound()) {
        let _ = socket.send_to_addr(state, &address);
    }
}
