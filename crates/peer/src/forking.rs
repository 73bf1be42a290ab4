//! `fork`, `child` and `join`: a forked child that obeys commands of its own, which come and go through pipes.

use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Write, pipe};

use crate::commands::Peer;
use crate::failure::Failure;
use crate::json::Object;

/// A child that runs.
pub(crate) struct Child {
    pid: libc::pid_t,
    commands: PipeWriter,
    answers: BufReader<PipeReader>,
}

/// Forks. In the child this does not return: it obeys what comes through the pipe, until that ends.
///
/// # Errors
/// What pipe(2) or fork(2) says.
pub(crate) fn fork(peer: &mut Peer) -> Result<Child, Failure> {
    let broken = |error: std::io::Error| Failure::io("pipe for a child", &error);
    let (child_reads, commands) = pipe().map_err(broken)?;
    let (answers, mut child_writes) = pipe().map_err(broken)?;
    // SAFETY: no other thread runs while a command is carried out, so the child finds no lock that nobody will open.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(Failure::errno("fork"));
    }
    if pid > 0 {
        return Ok(Child { pid, commands, answers: BufReader::new(answers) });
    }
    // Else it would wait for the end of its own commands for ever.
    drop((commands, answers));
    let status = peer.serve(BufReader::new(child_reads), &mut child_writes).map_or(1, i32::from);
    // SAFETY: ends the child at once; what its parent still has to print is its parent's.
    unsafe { libc::_exit(status) }
}

impl Child {
    pub(crate) fn pid(&self) -> u64 {
        u64::from(self.pid.unsigned_abs())
    }

    /// Has the child carry out a command; its answer as it came.
    ///
    /// # Errors
    /// A child that has ended instead.
    pub(crate) fn ask(&mut self, command: &str) -> Result<String, Failure> {
        let gone = |error: &std::io::Error| Failure::io("pipe to the child", error);
        self.commands.write_all(format!("{command}\n").as_bytes()).map_err(|error| gone(&error))?;
        let mut answer = String::new();
        match self.answers.read_line(&mut answer) {
            Ok(0) => Err(Failure::new("the child has ended; `join` tells how")),
            Ok(_) => Ok(answer),
            Err(error) => Err(gone(&error)),
        }
    }

    /// Waits for its end, which nothing holds up but its memory: status, or the signal that killed it.
    ///
    /// # Errors
    /// What waitpid(2) says.
    pub(crate) fn join(self) -> Result<Object, Failure> {
        drop(self.commands);
        let mut status = 0;
        // SAFETY: writes one int, into `status`, which lives across the call.
        if unsafe { libc::waitpid(self.pid, &raw mut status, 0) } != self.pid {
            return Err(Failure::errno("waitpid"));
        }
        let answer = Object::new().string("command", "join");
        Ok(if libc::WIFSIGNALED(status) {
            answer.number("signal", u64::from(libc::WTERMSIG(status).unsigned_abs()))
        } else {
            answer.number("status", u64::from(libc::WEXITSTATUS(status).unsigned_abs()))
        })
    }
}
