//! A client that connects, and then says hello.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};
use uffd::fd_passing;

use super::DEADLINE;

pub struct Client {
    socket: BufReader<UnixStream>,
    last: u64,
}

impl Client {
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Self { socket: BufReader::new(socket), last: 0 }
    }

    /// What is answered to a request, with descriptors that ride with it; what else is told meanwhile is passed over.
    pub fn ask(&mut self, method: &str, params: &Value, fds: &[BorrowedFd<'_>]) -> Value {
        self.last += 1;
        let request = json!({ "jsonrpc": "2.0", "id": self.last, "method": method, "params": params, "fds": fds.len() });
        let line = format!("{request}\n");
        fd_passing::send_all(self.socket.get_ref().as_fd(), line.as_bytes(), fds, DEADLINE).unwrap();
        loop {
            let answer = self.told();
            if answer["id"] == self.last {
                return answer;
            }
        }
    }

    /// The next thing that it is told.
    pub fn told(&mut self) -> Value {
        let mut line = String::new();
        self.socket.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_default()
    }

    pub fn hello(&mut self) -> Value {
        self.hello_as("by hand", &[])
    }

    /// Under a name, asking how sessions have ended.
    pub fn hello_as(&mut self, name: &str, sessions: &[u64]) -> Value {
        let params = json!({ "protocol": 1, "client": name, "sessions": sessions });
        self.ask("hello", &params, &[])["result"].clone()
    }
}
