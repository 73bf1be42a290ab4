//! What a service manager hears (sd_notify(3)), and the descriptors that it stores for its service, as systemd does.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

use super::DEADLINE;

/// What a test tells itself, behind everything else.
const MARK: &str = "X_TEST_MARK=1";

/// Whether it listens at this moment.
#[derive(Default)]
struct Gate {
    closed: Mutex<bool>,
    moved: Condvar,
}

pub struct Notified {
    /// All that is no matter of the store, and who said it.
    told: Receiver<(String, i32)>,
    pub store: Store,
    gate: Arc<Gate>,
    /// Ends the thread.
    socket: Arc<UnixDatagram>,
}

impl Notified {
    pub fn new(socket: UnixDatagram, most: usize) -> Self {
        let (sender, told) = channel();
        let (store, gate) = (Store::new(most), Arc::<Gate>::default());
        let socket = Arc::new(socket);
        let (here, its, open) = (Arc::clone(&socket), store.clone(), Arc::clone(&gate));
        std::thread::spawn(move || listen(&here, &its, &open, &sender));
        Self { told, store, gate, socket }
    }

    /// What the service tells next, and who it is.
    pub fn hears(&self) -> (String, i32) {
        self.told.recv_timeout(DEADLINE).expect("the service says nothing")
    }

    /// Of what has been sent so far nothing is left to be heard.
    pub fn hears_nothing(&self) {
        self.mark();
        assert_eq!(self.hears().0, MARK);
    }

    /// Waits until everything that has been sent so far was dealt with.
    pub fn catches_up(&self) {
        self.mark();
        while self.hears().0 != MARK {}
    }

    fn mark(&self) {
        let address = self.socket.local_addr().unwrap();
        UnixDatagram::unbound().unwrap().send_to_addr(MARK.as_bytes(), &address).unwrap();
    }

    /// What is told from now on waits in its queue until [`Self::listen_again`].
    pub fn do_not_listen(&self) {
        *self.gate.closed.lock().unwrap() = true;
    }

    pub fn listen_again(&self) {
        *self.gate.closed.lock().unwrap() = false;
        self.gate.moved.notify_all();
    }
}

impl Drop for Notified {
    fn drop(&mut self) {
        self.listen_again();
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

fn listen(socket: &UnixDatagram, store: &Store, gate: &Gate, told: &Sender<(String, i32)>) {
    loop {
        let closed = gate.closed.lock().unwrap();
        drop(gate.moved.wait_while(closed, |closed| *closed).unwrap());
        let mut text = [0; 4096];
        let mut space = nix::cmsg_space!(libc::ucred, [i32; 253]);
        let mut iov = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let Ok(message) = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags) else {
            return;
        };
        let (mut sender, mut fds) = (0, Vec::new());
        for control in message.cmsgs().unwrap() {
            match control {
                ControlMessageOwned::ScmCredentials(credentials) => sender = credentials.pid(),
                ControlMessageOwned::ScmRights(raw) => fds.extend(raw.into_iter().map(owned)),
                _ => {}
            }
        }
        let bytes = message.bytes;
        if bytes == 0 {
            return;
        }
        let text = String::from_utf8(text[..bytes].to_vec()).unwrap();
        if !store.take(&text, fds) && told.send((text, sender)).is_err() {
            return;
        }
    }
}

fn owned(raw: i32) -> OwnedFd {
    // SAFETY: the kernel has just put this descriptor into our table; its message is its only mention.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// A descriptor in the store, under its name.
struct Entry {
    name: String,
    fd: OwnedFd,
}

/// FileDescriptorStoreMax= descriptors.
#[derive(Clone)]
pub struct Store {
    most: usize,
    /// The youngest first, as systemd puts them (LIST_PREPEND).
    entries: Arc<Mutex<VecDeque<Entry>>>,
}

impl Store {
    fn new(most: usize) -> Self {
        Self { most, entries: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.entries.lock().unwrap()
    }

    /// Whether it was a matter of the store.
    fn take(&self, text: &str, fds: Vec<OwnedFd>) -> bool {
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let name = value("FDNAME").unwrap_or("stored").to_owned();
        if value("FDSTORE") == Some("1") {
            assert!(name.len() <= 255 && name.bytes().all(|byte| (33..127).contains(&byte) && byte != b':'));
            assert_eq!(value("FDPOLL"), Some("0"), "the manager would take it out when it hangs up");
            assert_eq!(fds.len(), 1, "which is which is known by the name alone");
            fds.into_iter().for_each(|fd| self.add(name.clone(), fd));
            return true;
        }
        assert!(fds.is_empty());
        if value("FDSTOREREMOVE") == Some("1") {
            self.remove(&name);
            return true;
        }
        false
    }

    fn add(&self, name: String, fd: OwnedFd) {
        let mut entries = self.lock();
        // In the order in which systemd looks: a full store is not asked whether it has it.
        if entries.len() < self.most && !entries.iter().any(|entry| same_open_file(&entry.fd, &fd)) {
            entries.push_front(Entry { name, fd });
        }
    }

    /// FDSTOREREMOVE=1, or something that went wrong.
    pub fn remove(&self, name: &str) {
        self.lock().retain(|entry| entry.name != name);
    }

    pub fn len(&self) -> usize {
        self.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn names(&self) -> Vec<String> {
        self.lock().iter().map(|entry| entry.name.clone()).collect()
    }

    /// The names of what /proc says is this.
    pub fn names_of(&self, what: &str) -> Vec<String> {
        let is = |entry: &&Entry| {
            let path = std::fs::read_link(format!("/proc/self/fd/{}", entry.fd.as_raw_fd())).unwrap();
            path.to_string_lossy().contains(what)
        };
        self.lock().iter().filter(is).map(|entry| entry.name.clone()).collect()
    }

    /// What is said of a descriptor in /proc.
    pub fn info(&self, name: &str) -> String {
        let entries = self.lock();
        let entry = entries.iter().find(|entry| entry.name == name).unwrap();
        std::fs::read_to_string(format!("/proc/self/fdinfo/{}", entry.fd.as_raw_fd())).unwrap()
    }

    /// Duplicates of everything, by name.
    pub fn all(&self) -> Vec<(String, OwnedFd)> {
        self.lock().iter().map(|entry| (entry.name.clone(), entry.fd.try_clone().unwrap())).collect()
    }
}

fn same_open_file(one: &OwnedFd, other: &OwnedFd) -> bool {
    let pid = std::process::id();
    let (one, other) = (one.as_raw_fd(), other.as_raw_fd());
    // SAFETY: takes numbers, and compares.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, 0, one, other) };
    Errno::result(order).expect("kcmp(2), which systemd has") == 0
}
