//! A running peer: its command line, its answers, its end.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;

use serde_json::Value;

use super::DEADLINE;

/// The peer's command, with nothing behind it.
pub(crate) fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_userfaultfd-peer"))
}

/// Runs a peer that ends by itself, because its input is empty or its command line is refused.
pub(crate) fn run(arguments: &[&str]) -> Output {
    command().args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// A peer that is killed when the test drops it.
pub(crate) struct Peer {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Peer {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::spawn(command().args(arguments))
    }

    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { input: child.stdin.take(), child, lines }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line it prints.
    pub(crate) fn line(&mut self) -> Value {
        match self.lines.recv_timeout(DEADLINE) {
            Ok(line) => serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}")),
            Err(RecvTimeoutError::Timeout) => panic!("the peer printed nothing within {DEADLINE:?}"),
            Err(RecvTimeoutError::Disconnected) => panic!("the peer has ended: {}", self.complaint()),
        }
    }

    /// Sends a command without waiting for the answer.
    pub(crate) fn send(&mut self, command: &str) {
        self.input.as_mut().unwrap().write_all(format!("{command}\n").as_bytes()).unwrap();
    }

    /// Sends a command; the answer.
    pub(crate) fn command(&mut self, command: &str) -> Value {
        self.send(command);
        self.line()
    }

    /// Ends its input.
    pub(crate) fn close_input(&mut self) {
        self.input = None;
    }

    /// Its end, which must come by itself.
    pub(crate) fn status(&mut self) -> ExitStatus {
        // The end of its output is the first sign of its end, and this wait has a deadline.
        loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return self.child.wait().unwrap(),
                Err(RecvTimeoutError::Timeout) => panic!("the peer still runs after {DEADLINE:?}"),
            }
        }
    }

    /// What it wrote to standard error. Only after its end.
    pub(crate) fn complaint(&mut self) -> String {
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Already reaped where the test waited for its end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
