//! The one error of this program: a line of text. Nothing here recovers from an error; it is printed for the
//! person who reads a failed test, so it names the call, its value and what the kernel said.

use std::fmt::{self, Display};
use std::io;

/// Why the program, or one command of it, could not go on. Always a single line.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl Failure {
    /// A failure that no system call reported.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }

    /// A failed call of the standard library: `what` names it with its values.
    pub(crate) fn io(what: impl Display, error: &io::Error) -> Self {
        Self(format!("{what}: {error}"))
    }

    /// A raw system call that has just failed: `what` names it with its values, `errno` supplies the rest.
    /// To be called before anything else can change `errno`.
    pub(crate) fn errno(what: impl Display) -> Self {
        let error = io::Error::last_os_error();
        Self::io(what, &error)
    }
}

impl Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // One failure is one line, whatever the file names and system messages in it contain.
        out.write_str(&self.0.replace(['\n', '\r'], " "))
    }
}
