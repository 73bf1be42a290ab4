//! A manager with a store, a service in it, and the processes that it serves.

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::client::Client;
use super::guest::{self, Guest};
use super::service::{Service, comm};
use super::{Manager, Notify, until};

const PAGES: usize = 64;
/// Of a session: userfaultfd, record, pidfd.
pub const OF_A_SESSION: usize = 3;

pub struct Stage {
    pub manager: Manager,
    pub image: PathBuf,
    pub hash: String,
}

impl Stage {
    pub fn new(most: usize) -> Self {
        let manager = Manager::with_store(Notify::Path, most);
        let image = manager.dir.path().join("image");
        let hash = guest::image(&image, PAGES);
        Self { manager, image, hash }
    }

    /// One whose session is stored.
    pub fn guest(&self, adopt: Value) -> Guest {
        // The last of its parts.
        let before = self.manager.store().names_of("pidfd").len();
        let guest = self.unstored_guest(adopt);
        until("its session is stored", || self.manager.store().names_of("pidfd").len() > before);
        guest
    }

    pub fn unstored_guest(&self, adopt: Value) -> Guest {
        Guest::start(&self.manager.path(), &self.image, adopt)
    }

    /// What the daemon says of itself, and how these sessions have ended.
    pub fn hello(&self, sessions: &[u64]) -> Value {
        Client::connect(&self.manager.path()).hello_as("asks", sessions)
    }

    pub fn session_ids(&self) -> Vec<u64> {
        let welcome = self.hello(&[]);
        welcome["sessions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|session| session["id"].as_u64().unwrap())
            .collect()
    }

    /// Waits until these are served, and no others.
    pub fn serves(&self, sessions: &[u64]) {
        until("these sessions are served", || self.session_ids() == sessions);
    }

    /// How a session has ended: its reason, and in words why.
    pub fn end_of(&self, session: u64) -> (String, String) {
        let ends = self.hello(&[session])["ends"].clone();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&ends[0]["reason"]), text(&ends[0]["error"]["message"]))
    }

    /// Waits until this is written down.
    pub fn journal_says(&self, what: &str) {
        until("it is written down", || {
            let mut all = self.manager.store().all().into_iter();
            let journal = all.find(|(name, _)| name.starts_with("uffd-journal"));
            journal.is_some_and(|(_, fd)| {
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                std::fs::read_to_string(path).unwrap().contains(what)
            })
        });
    }

    /// The names under which the parts of the only session are stored: userfaultfd, record, pidfd.
    pub fn parts(&self) -> [String; OF_A_SESSION] {
        ["userfaultfd]", "memfd:userfaultfd-session", "pidfd"].map(|what| {
            let mut names = self.manager.store().names_of(what);
            assert_eq!(names.len(), 1, "{what}");
            names.remove(0)
        })
    }
}

/// Its daemon, stopped.
pub fn stopped(service: &Service) -> i32 {
    let daemon = daemon_of(service);
    kill(Pid::from_raw(daemon), Signal::SIGSTOP).unwrap();
    until("all of its threads are stopped", || threads(daemon).iter().all(|stat| stat.contains(") T ")));
    daemon
}

fn threads(pid: i32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default()).collect()
}

/// The one that serves: it has an heir.
pub fn daemon_of(service: &Service) -> i32 {
    let mut daemon = None;
    until("there is a daemon", || {
        let others = service.others();
        daemon = others.iter().copied().find(|&pid| {
            let heirs =
                std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            heirs.split_whitespace().any(|heir| comm(heir.parse().unwrap()) == "uffd-heir")
        });
        daemon.is_some()
    });
    daemon.unwrap()
}
