//! The service: its main process and all that are of it; ended with the test.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{DEADLINE, until};

pub struct Service {
    child: Child,
    /// Lines of its standard error, which is everybody's.
    log: Receiver<String>,
}

impl Service {
    pub fn spawn(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let (sender, log) = channel();
        if let Some(stderr) = child.stderr.take() {
            std::thread::spawn(move || {
                let lines = BufReader::new(stderr).lines();
                lines.map_while(Result::ok).try_for_each(|line| sender.send(line))
            });
        }
        Self { child, log }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Waits until somebody of it has said this.
    pub fn says(&self, what: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.log.recv_timeout(left).unwrap_or_else(|_| panic!("nobody has said {what:?}"));
            if line.contains(what) {
                return line;
            }
        }
    }

    /// Its status; what it has said on standard output.
    pub fn ends(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().code(), said)
    }

    /// All processes of it beside the main one.
    pub fn others(&self) -> Vec<i32> {
        let mut all = vec![self.pid()];
        let mut at = 0;
        while let Some(&pid) = all.get(at) {
            all.extend(children_of(pid));
            at += 1;
        }
        all.split_off(1)
    }

    /// SIGKILL for its main process, and for the others what a manager sends behind it; waits until nobody is left.
    pub fn killed(mut self, others: Signal) {
        let rest = self.others();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        for &pid in &rest {
            // It may have ended already.
            let _ = kill(Pid::from_raw(pid), others);
        }
        until("all of its processes are gone", || rest.iter().all(|&pid| !is_alive(pid)));
    }

    /// SIGKILL for its main process alone; who else there was.
    pub fn beheaded(mut self) -> Vec<i32> {
        let rest = self.others();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        rest
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.log.try_iter().for_each(|line| eprintln!("{line}"));
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            // In order: a daemon whose holder is killed goes on.
            let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
        }
        let deadline = Instant::now() + DEADLINE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let rest = self.others();
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in rest {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn children_of(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    children
        .flat_map(|text| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

/// Neither gone nor a zombie.
pub fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

pub fn comm(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}
