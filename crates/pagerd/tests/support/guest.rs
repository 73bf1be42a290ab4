//! A process that is served: the test program again, with memory whose bytes are an image's, which it reads when it is told to. It
//! hands its memory over as a client, and keeps no userfaultfd of its own: who answers its faults is the daemon's and the manager's matter.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uffd::{CreateOptions, Factory, Features, Mapping, Modes};

use super::client::Client;
use super::{DEADLINE, until};

const PAGE: usize = 4096;
const GUEST: &str = "PAGERD_TEST_GUEST";

/// An image of so many pages, no two of which are alike, and its hash.
pub fn image(path: &Path, pages: usize) -> String {
    let words = (0..(pages * PAGE / 8) as u64).map(|index| (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
    std::fs::write(path, &bytes).unwrap();
    hash(&bytes)
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub struct Guest {
    child: Child,
    orders: ChildStdin,
    said: Receiver<String>,
    pub session: u64,
}

impl Guest {
    /// Starts one whose memory is the image's, served by the daemon at this path; `adopt` are further parameters of the session.
    pub fn start(path: &Path, image: &Path, adopt: Value) -> Self {
        let what = json!({ "path": path, "image": image, "adopt": adopt });
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_guest", "--nocapture", "--test-threads=1"])
            .env(GUEST, what.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, said) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn(move || {
            let said =
                lines.map_while(Result::ok).filter_map(|line| Some(line.split_once("guest: ")?.1.to_owned()));
            said.map(|line| sender.send(line)).take_while(Result::is_ok).count()
        });
        let orders = child.stdin.take().unwrap();
        let mut guest = Self { child, orders, said, session: 0 };
        guest.session = guest.says().parse().unwrap();
        guest
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// What it says next.
    pub fn says(&self) -> String {
        self.said.recv_timeout(DEADLINE).expect("the guest is silent")
    }

    /// Has it read a page, which may wait.
    pub fn reads(&mut self, page: usize) {
        writeln!(self.orders, "{page}").unwrap();
    }

    /// Waits until it has.
    pub fn has_read(&self, page: usize) {
        assert_eq!(self.says(), format!("read {page}"));
    }

    /// Reads all of its memory.
    pub fn hash(&mut self) -> String {
        writeln!(self.orders, "all").unwrap();
        self.says()
    }

    /// How it ended.
    pub fn ends(&mut self) -> ExitStatus {
        let mut status = None;
        until("the guest has ended", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs as a guest where this process was started as one.
pub fn run_if_asked() {
    let Some(what) = std::env::var_os(GUEST) else { return };
    let what: Value = serde_json::from_str(what.to_str().unwrap()).unwrap();
    let text = |name: &str| what[name].as_str().unwrap().to_owned();
    let image = File::open(text("image")).unwrap();
    let len = image.metadata().unwrap().len();
    let mapping = Arc::new(Mapping::anonymous(len as usize, Default::default()).unwrap());
    let follow = Features::EVENT_REMOVE;
    let uffd =
        Factory::open().create(&CreateOptions { require: follow, ..CreateOptions::default() }).unwrap();
    // SAFETY: no reference to the mapping exists; it is read by copying.
    unsafe { uffd.register(mapping.address(), len, Modes::MISSING) }.unwrap();
    let mut client = Client::connect(text("path").as_ref());
    client.hello_as(&format!("guest {}", std::process::id()), &[]);
    let source = json!({ "source": 1, "description": { "kind": "file", "fd": 0, "path": text("image") } });
    let opened = client.ask("source.open", &source, &[image.as_fd()]);
    assert!(opened["error"].is_null(), "{opened}");
    let mut adopt = json!({
        "source": 1,
        "regions": [{ "address": format!("{:#x}", mapping.address()), "length": len, "sourceOffset": 0 }],
        "pageSize": PAGE,
        "window": PAGE,
        "uffd": 0,
        "own": true,
    });
    for (name, value) in what["adopt"].as_object().unwrap() {
        adopt[name] = value.clone();
    }
    let adopted = client.ask("session.adopt", &adopt, &[uffd.as_fd()]);
    let session = adopted["result"]["session"].as_u64().unwrap_or_else(|| panic!("{adopted}"));
    drop(uffd);
    println!("guest: {session}");
    for order in std::io::stdin().lines().map_while(Result::ok) {
        let mapping = Arc::clone(&mapping);
        // Whoever waits holds up nobody else.
        std::thread::spawn(move || match order.parse::<usize>() {
            Ok(page) => {
                mapping.read(page * PAGE, &mut [0; 8]).unwrap();
                println!("guest: read {page}");
            }
            Err(_) => {
                let mut bytes = vec![0; mapping.len()];
                mapping.read(0, &mut bytes).unwrap();
                println!("guest: {}", hash(&bytes));
            }
        });
    }
    std::process::exit(0);
}
