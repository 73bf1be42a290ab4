//! Rows, what they expect, and running them.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use nix::errno::Errno;
use uffd::pagemap::PagemapError;
use uffd::{MappingError, UffdError};

use crate::support::{DEADLINE, PAGE};

/// How a row ended, if not well.
#[derive(Debug, PartialEq)]
pub(crate) enum Stop {
    Uffd(UffdError),
    /// Of a system call that the row makes itself.
    Errno(i32),
    /// The machine lacks something.
    Skipped(String),
}

pub(crate) type Outcome = Result<(), Stop>;

impl From<UffdError> for Stop {
    fn from(error: UffdError) -> Self {
        Self::Uffd(error)
    }
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno as i32)
    }
}

impl From<MappingError> for Stop {
    fn from(error: MappingError) -> Self {
        Self::Errno(error.errno())
    }
}

impl From<PagemapError> for Stop {
    fn from(error: PagemapError) -> Self {
        Self::Errno(error.errno())
    }
}

pub(crate) fn skipped<T>(reason: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Skipped(reason.into()))
}

/// What a row expects.
#[derive(Debug, PartialEq)]
pub(crate) enum Expect {
    Done,
    Is(UffdError),
    Errno(i32),
}
pub(crate) use Expect::{Done, Errno as Fails, Is};

pub(crate) const EXIST: Expect = Is(UffdError::PageExist);
pub(crate) const ENOENT: Expect = Is(UffdError::NotRegistered);
pub(crate) const GONE: Expect = Is(UffdError::UffdClosed);
pub(crate) const CHANGING: Expect = Is(UffdError::Changing);
pub(crate) const EINVAL: Expect = Fails(libc::EINVAL);
pub(crate) const EFAULT: Expect = Fails(libc::EFAULT);

pub(crate) fn partial(pages: u64) -> Expect {
    Is(UffdError::PartiallyCopied { done: pages * PAGE })
}

fn matches(expect: &Expect, outcome: &Outcome) -> bool {
    match (expect, outcome) {
        (Done, Ok(())) => true,
        (Is(expected), Err(Stop::Uffd(error))) => expected == error,
        (Fails(errno), Err(Stop::Uffd(UffdError::System { errno: got, .. }))) => *errno == *got as i32,
        (Fails(errno), Err(Stop::Errno(got))) => errno == got,
        _ => false,
    }
}

pub(crate) struct Row {
    name: String,
    expect: Expect,
    act: Box<dyn FnOnce() -> Outcome + Send>,
}

/// `name` is the ioctl and the case, as they are spoken of.
pub(crate) fn row(
    name: impl Into<String>,
    expect: Expect,
    act: impl FnOnce() -> Outcome + Send + 'static,
) -> Row {
    Row { name: name.into(), expect, act: Box::new(act) }
}

/// Runs each row on a thread of its own, which may wait for a page or fail, and names those that differ.
pub(crate) fn answer_as_recorded(rows: Vec<Row>) {
    answer_within(DEADLINE, rows);
}

/// The same for rows that take long by themselves.
pub(crate) fn answer_within(deadline: Duration, rows: Vec<Row>) {
    // What was answered as recorded, told at the end in one piece: lists name these rows.
    let mut told = String::new();
    let mut different = Vec::new();
    for Row { name, expect, act } in rows {
        let (done, answer) = channel();
        let thread = std::thread::Builder::new().name(name.clone());
        thread.spawn(move || done.send(act())).unwrap();
        match answer.recv_timeout(deadline) {
            // On stderr: a test in a process of its own has nothing else to say it on.
            Ok(Err(Stop::Skipped(reason))) => {
                told.push_str(&format!("row: {name}\n"));
                eprintln!("skipped: {name}: {reason}");
            }
            Ok(outcome) if matches(&expect, &outcome) => told.push_str(&format!("row: {name}\n")),
            Ok(outcome) => different.push(format!("{name}: expected {expect:?}, got {outcome:?}")),
            Err(RecvTimeoutError::Timeout) => different.push(format!("{name}: still waits")),
            Err(RecvTimeoutError::Disconnected) => different.push(format!("{name}: failed, see above")),
        }
    }
    eprint!("{told}");
    assert!(different.is_empty(), "{}", different.join("\n"));
}
