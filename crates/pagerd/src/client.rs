//! One connection of a client: lines in, with the descriptors that ride with them; lines out, as far as it reads them.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use serde_json::Value;
use uffd::fd_passing::{self, Credentials, FdPassingError, MOST_FDS};

/// Bytes of a line: 65,536 regions fit.
const LONGEST_LINE: usize = 8 << 20;
/// Bytes that a client has not read yet; one that reads nothing any more is let go of.
const MOST_UNREAD: usize = 16 << 20;
/// Beyond so many unread bytes it hears of counters no more: they come again.
const MANY_UNREAD: usize = 256 << 10;
/// Descriptors that no line has claimed yet.
const MOST_UNCLAIMED: usize = 2 * MOST_FDS;
/// Requests of one client that are not answered yet.
pub(crate) const MOST_OUTSTANDING: usize = 1024;
/// Pieces taken per turn: a flood of one client holds up nobody else.
const PIECES_PER_TURN: usize = 16;

pub(crate) struct Client {
    socket: OwnedFd,
    pub(crate) credentials: Credentials,
    /// What it calls itself, once it has said hello.
    pub(crate) token: Option<String>,
    pub(crate) since: Instant,
    pub(crate) outstanding: usize,
    /// It writes recordings to their files.
    pub(crate) brings_recordings: bool,
    input: Vec<u8>,
    /// Bytes of `input` in which there is no end of a line.
    searched: usize,
    fds: VecDeque<OwnedFd>,
    output: VecDeque<u8>,
    /// It is to be let go of once it has read what it was told.
    pub(crate) leaving: bool,
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Gone {
    #[error("it hung up")]
    HungUp,
    #[error("it sent a line of more than {LONGEST_LINE} bytes")]
    TooLong,
    #[error("it sent descriptors that belong to no line")]
    Unclaimed,
    #[error("it does not read what it is told")]
    NotReading,
    #[error("{0}")]
    Failed(#[from] FdPassingError),
}

impl Client {
    pub(crate) fn new(socket: OwnedFd, credentials: Credentials) -> Self {
        Self {
            socket,
            credentials,
            token: None,
            since: Instant::now(),
            outstanding: 0,
            brings_recordings: false,
            input: Vec::new(),
            searched: 0,
            fds: VecDeque::new(),
            output: VecDeque::new(),
            leaving: false,
        }
    }

    /// Whole lines that have come.
    pub(crate) fn receive(&mut self) -> Result<Vec<Vec<u8>>, Gone> {
        let mut piece = vec![0; 64 << 10];
        for _ in 0..PIECES_PER_TURN {
            match fd_passing::recv(self.socket.as_fd(), &mut piece, MOST_FDS) {
                Ok(received) if received.len == 0 => return Err(Gone::HungUp),
                Ok(received) => {
                    self.input.extend_from_slice(piece.get(..received.len).unwrap_or_default());
                    self.fds.extend(received.fds);
                }
                Err(FdPassingError::WouldBlock) => break,
                Err(error) => return Err(error.into()),
            }
        }
        let lines = self.lines();
        if self.input.len() > LONGEST_LINE {
            return Err(Gone::TooLong);
        }
        if self.fds.len() > MOST_UNCLAIMED {
            return Err(Gone::Unclaimed);
        }
        Ok(lines)
    }

    fn lines(&mut self) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        let mut start = 0;
        let mut from = self.searched;
        while let Some(end) = self.input.get(from..).and_then(|rest| rest.iter().position(|&b| b == b'\n')) {
            let end = from + end;
            lines.push(self.input.get(start..end).unwrap_or_default().to_vec());
            start = end + 1;
            from = start;
        }
        self.input.drain(..start);
        self.searched = self.input.len();
        lines
    }

    /// The descriptors of a line that says how many it has: those that came first.
    pub(crate) fn claim(&mut self, count: usize) -> Option<Vec<OwnedFd>> {
        (count <= self.fds.len()).then(|| self.fds.drain(..count).collect())
    }

    /// Tells it something.
    pub(crate) fn tell(&mut self, message: &Value) -> Result<(), Gone> {
        self.output.extend(message.to_string().as_bytes());
        self.output.push_back(b'\n');
        if self.output.len() > MOST_UNREAD {
            return Err(Gone::NotReading);
        }
        self.flush()
    }

    /// Sends as much as there is room for.
    pub(crate) fn flush(&mut self) -> Result<(), Gone> {
        while !self.output.is_empty() {
            let (next, _) = self.output.as_slices();
            match fd_passing::send(self.socket.as_fd(), next, &[]) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(FdPassingError::WouldBlock) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    pub(crate) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    pub(crate) fn is_behind(&self) -> bool {
        self.output.len() > MANY_UNREAD
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
