//! A pager of the simplest kind: a thread that answers each fault with one page of an image held in memory.

use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use serde_json::Value;

use super::receiver::Connection;

const UFFDIO_WAKE: u32 = 0x8010_aa02;
const UFFDIO_COPY: u32 = 0xc028_aa03;
const UFFDIO_POISON: u32 = 0xc020_aa08;
const EVENT_PAGEFAULT: u64 = 0x12;
const EVENT_REMOVE: u64 = 0x15;
const MESSAGE_WORDS: usize = 4;

/// What to serve, and which mistakes to make.
#[derive(Clone, Default)]
pub(crate) struct Plan {
    /// The image.
    pub(crate) image: Vec<u8>,
    /// Image offset of a page to poison instead of filling it.
    pub(crate) poison: Option<u64>,
    /// Answer faults in removed memory from the image, as a broken pager does.
    pub(crate) forget_removals: bool,
}

/// A serving thread; stops when dropped.
pub(crate) struct Pager {
    stopper: UnixStream,
    thread: Option<JoinHandle<u64>>,
    installed: u64,
}

struct Region {
    base: u64,
    size: u64,
    offset: u64,
    page_size: u64,
}

struct Serving {
    uffd: OwnedFd,
    plan: Plan,
    regions: Vec<Region>,
    removed: Vec<Range<u64>>,
    installed: u64,
}

impl Pager {
    /// Takes the handshake off the connection and serves it.
    pub(crate) fn serve(connection: &Connection, plan: Plan) -> Self {
        let mut message = connection.message();
        let uffd = message.descriptors.remove(0);
        let regions: Value = serde_json::from_slice(&message.bytes).unwrap();
        let number = |region: &Value, name: &str| region[name].as_u64().unwrap();
        let regions = regions
            .as_array()
            .unwrap()
            .iter()
            .map(|region| Region {
                base: number(region, "base_host_virt_addr"),
                size: number(region, "size"),
                offset: number(region, "offset"),
                page_size: number(region, "page_size"),
            })
            .collect();
        let serving = Serving { uffd, plan, regions, removed: Vec::new(), installed: 0 };
        let (stopper, stopped) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || serving.run(&stopped));
        Self { stopper, thread: Some(thread), installed: 0 }
    }

    /// Stops serving; how many pages were filled. Before the end the number would lag: the peer goes on as
    /// soon as the page is there.
    pub(crate) fn stop(&mut self) -> u64 {
        // A pager that has panicked does not read it any more.
        let _ = self.stopper.write_all(&[1]);
        if let Some(thread) = self.thread.take() {
            self.installed = thread.join().expect("the pager's thread panicked");
        }
        self.installed
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.stop();
        }
    }
}

impl Serving {
    fn run(mut self, stopped: &UnixStream) -> u64 {
        let mut waiting: Vec<u64> = Vec::new();
        loop {
            let timeout = if waiting.is_empty() { -1 } else { 0 };
            let mut polled = [self.uffd.as_raw_fd(), stopped.as_raw_fd()].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            // SAFETY: `polled` has two entries and lives across the call.
            let ready = unsafe { libc::poll(polled.as_mut_ptr(), 2, timeout) };
            assert!(ready >= 0, "poll: {}", io::Error::last_os_error());
            if polled[1].revents != 0 {
                return self.installed;
            }
            self.read_messages(&mut waiting);
            waiting.retain(|address| !self.resolve(*address));
            // A page that could not be filled waits for the thread inside madvise to run.
            thread::yield_now();
        }
    }

    /// Reads until nothing is left. Removals take effect before any of the faults is answered.
    fn read_messages(&mut self, waiting: &mut Vec<u64>) {
        loop {
            let mut message = [0u64; MESSAGE_WORDS];
            let size = size_of_val(&message);
            // SAFETY: the kernel writes one message of `size` bytes into `message`.
            let got = unsafe { libc::read(self.uffd.as_raw_fd(), message.as_mut_ptr().cast(), size) };
            if got < 0 {
                let error = io::Error::last_os_error();
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "read of the userfaultfd: {error}");
                return;
            }
            match message[0] & 0xff {
                EVENT_PAGEFAULT => waiting.push(message[2]),
                EVENT_REMOVE => self.removed.push(message[1]..message[2]),
                other => panic!("unexpected event {other:#x}"),
            }
        }
    }

    /// Whether the fault is done with; otherwise it has to be tried again.
    fn resolve(&mut self, address: u64) -> bool {
        let region =
            self.regions.iter().find(|region| (region.base..region.base + region.size).contains(&address));
        let region = region.unwrap_or_else(|| panic!("fault at {address:#x}, in no region"));
        let page = region.page_size;
        let start = address - (address - region.base) % page;
        let offset = start - region.base + region.offset;
        if self.plan.poison == Some(offset) {
            return self.finished(UFFDIO_POISON, &mut [start, page, 0, 0], start, page);
        }
        let removed = self.removed.iter().any(|range| range.contains(&start));
        let bytes = if removed && !self.plan.forget_removals {
            vec![0; page as usize]
        } else {
            self.plan.image[offset as usize..][..page as usize].to_vec()
        };
        let source = bytes.as_ptr().expose_provenance() as u64;
        self.finished(UFFDIO_COPY, &mut [start, source, page, 0, 0], start, page)
    }

    fn finished(&mut self, request: u32, argument: &mut [u64], start: u64, page: u64) -> bool {
        match self.ioctl(request, argument) {
            Ok(()) => {
                self.installed += 1;
                true
            }
            Err(libc::EAGAIN) => false,
            Err(libc::EEXIST) => self.ioctl(UFFDIO_WAKE, &mut [start, page]).is_ok(),
            // The process is gone.
            Err(libc::ESRCH) => true,
            Err(errno) => panic!("ioctl {request:#x} at {start:#x}: errno {errno}"),
        }
    }

    fn ioctl(&self, request: u32, argument: &mut [u64]) -> Result<(), i32> {
        assert_eq!(size_of_val(argument), (request >> 16 & 0x3fff) as usize, "the size is in the number");
        // SAFETY: `argument` has the size that `request` encodes, and lives across the call; a source that it
        // names is a live buffer of a page.
        let result =
            unsafe { libc::ioctl(self.uffd.as_raw_fd(), request as libc::Ioctl, argument.as_mut_ptr()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap()) }
    }
}
