//! The commands: a line in, a line out. A line that cannot be obeyed is answered too, so that whoever drives
//! this process never waits for an answer that does not come.

use std::fs;
use std::io::{BufRead, Write};

use crate::failure::Failure;
use crate::forking::{self, Child};
use crate::json::Object;
use crate::memory::Memory;
use crate::page_set::PageSet;
use crate::words::Settings;
use crate::{content, discard, text, touch};

/// What the commands work on.
pub(crate) struct Peer {
    memory: Memory,
    discarded: PageSet,
    child: Option<Child>,
}

/// A command carried out.
enum Outcome {
    Answer(Object),
    /// The answer of a child, as it came.
    Relay(String),
    Exit(u8),
}

impl Peer {
    /// A peer of which nothing has been discarded yet.
    pub(crate) fn new(memory: Memory) -> Self {
        let discarded = PageSet::new(memory.pages());
        Self { memory, discarded, child: None }
    }

    /// Obeys `input` until `exit` or its end; the status to exit with.
    ///
    /// # Errors
    /// An input or output that fails; never a command.
    pub(crate) fn serve(&mut self, mut input: impl BufRead, output: &mut impl Write) -> Result<u8, Failure> {
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = input.read_until(b'\n', &mut line);
            if read.map_err(|error| Failure::io("read of standard input", &error))? == 0 {
                return Ok(0);
            }
            let text = String::from_utf8_lossy(&line);
            let text = text.trim();
            let (command, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
            let (answer, status) = match self.obey(command, rest.trim_start()) {
                Ok(Outcome::Answer(object)) => (object, None),
                Ok(Outcome::Relay(answer)) => {
                    print_line(output, &answer)?;
                    continue;
                }
                Ok(Outcome::Exit(status)) => (
                    Object::new().string("command", "exit").number("status", u64::from(status)),
                    Some(status),
                ),
                Err(failure) => {
                    (Object::new().string("command", command).string("error", &failure.to_string()), None)
                }
            };
            print(output, answer)?;
            if let Some(status) = status {
                return Ok(status);
            }
        }
    }

    fn obey(&mut self, command: &str, rest: &str) -> Result<Outcome, Failure> {
        let words: Vec<&str> = rest.split_whitespace().collect();
        if let Some(outcome) = self.obey_forking(command, rest) {
            return outcome;
        }
        let memory = &self.memory;
        let answer = match (command, words.as_slice()) {
            ("touch", _) => touch::touch(memory, &Settings::parse(rest)?)?,
            ("hash", []) => content::hash(memory, None),
            ("hash", ["skip-discarded"]) => content::hash(memory, Some(&self.discarded)),
            ("read", [offset, len]) => {
                content::read(memory, text::bytes("OFFSET", offset)?, length("LEN", len)?)?
            }
            ("write", [offset, hex]) => {
                content::write(memory, text::bytes("OFFSET", offset)?, &text::from_hex("HEX", hex)?)?
            }
            ("discard", [offset, len]) => {
                let (offset, len) = (text::bytes("OFFSET", offset)?, length("LEN", len)?);
                discard::range(memory, &mut self.discarded, offset, len)?
            }
            ("discard-random", _) => discard::random(memory, &mut self.discarded, &Settings::parse(rest)?)?,
            ("zeros", []) => content::zeros(memory, &self.discarded),
            ("compare", [_, ..]) => content::compare(memory, &self.discarded, rest)?,
            ("probe", [offset]) => content::probe(memory, text::bytes("OFFSET", offset)?)?,
            ("resident", []) => Object::new()
                .string("command", "resident")
                .number("pages", memory.resident_pages()?)
                .number("rss_kib", resident_set()?),
            ("exit", []) => return Ok(Outcome::Exit(0)),
            ("exit", [status]) => {
                let status = u8::try_from(text::number("STATUS", status)?)
                    .map_err(|_| Failure::new(format!("STATUS: expected 0 to 255, got {status}")))?;
                return Ok(Outcome::Exit(status));
            }
            (
                "hash" | "read" | "write" | "discard" | "zeros" | "compare" | "probe" | "resident" | "exit"
                | "fork" | "child" | "join",
                _,
            ) => {
                return Err(Failure::new(format!(
                    "wrong number of words behind it: {rest:?}; --help shows what is expected"
                )));
            }
            _ => return Err(Failure::new("unknown command; --help lists them")),
        };
        Ok(Outcome::Answer(answer))
    }

    /// The commands that concern a child; `None` for others.
    fn obey_forking(&mut self, command: &str, rest: &str) -> Option<Result<Outcome, Failure>> {
        let none = || Failure::new("there is no child: `fork` makes one");
        Some(match (command, rest) {
            ("fork", "") if self.child.is_some() => {
                Err(Failure::new("there is a child already: `join` it first"))
            }
            ("fork", "") => forking::fork(self).map(|child| {
                let pid = child.pid();
                self.child = Some(child);
                Outcome::Answer(Object::new().string("command", "fork").number("pid", pid))
            }),
            ("child", wanted) if !wanted.is_empty() => {
                self.child.as_mut().ok_or_else(none).and_then(|child| child.ask(wanted)).map(Outcome::Relay)
            }
            ("join", "") => self.child.take().ok_or_else(none).and_then(Child::join).map(Outcome::Answer),
            _ => return None,
        })
    }
}

/// Writes one line and flushes it: the reader waits for it.
///
/// # Errors
/// An output that fails, as when its reader is gone.
pub(crate) fn print(output: &mut impl Write, object: Object) -> Result<(), Failure> {
    print_line(output, &(object.finish() + "\n"))
}

fn print_line(output: &mut impl Write, line: &str) -> Result<(), Failure> {
    output
        .write_all(line.as_bytes())
        .and_then(|()| output.flush())
        .map_err(|error| Failure::io("write to standard output", &error))
}

fn length(name: &str, value: &str) -> Result<usize, Failure> {
    usize::try_from(text::bytes(name, value)?)
        .map_err(|_| Failure::new(format!("{name}: {value} does not fit this machine's addresses")))
}

/// VmRSS of proc(5), in KiB. Huge pages do not count in it.
fn resident_set() -> Result<u64, Failure> {
    let path = "/proc/self/status";
    let status = fs::read_to_string(path).map_err(|error| Failure::io(format!("read of {path}"), &error))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let value = line.and_then(|rest| rest.split_whitespace().next()).unwrap_or_default();
    text::number("VmRSS", value)
}
