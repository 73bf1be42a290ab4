//! Sources that fail.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use pager::{PageSource, PagerError, ReadNow};

use super::DEADLINE;

/// Fails while it is told to.
#[derive(Debug)]
pub struct Failing {
    bytes: Vec<u8>,
    pub fails: AtomicBool,
}

impl Failing {
    pub fn new(bytes: &[u8]) -> Arc<Self> {
        Arc::new(Self { bytes: bytes.to_vec(), fails: AtomicBool::new(true) })
    }
}

impl PageSource for Failing {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        self.read(offset, buffer).map(|()| ReadNow::Done)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        if self.fails.load(Ordering::SeqCst) {
            return Err(PagerError::Protocol("the store does not answer".to_owned()));
        }
        buffer.copy_from_slice(&self.bytes[offset as usize..][..buffer.len()]);
        Ok(())
    }
}

/// Its first read fails, when it is let; all others bring the bytes.
#[derive(Debug)]
pub struct FailingLate {
    bytes: Vec<u8>,
    pub reads: AtomicUsize,
    gate: Mutex<Receiver<()>>,
}

impl FailingLate {
    /// It, and what lets its first read fail.
    pub fn new(bytes: &[u8]) -> (Arc<Self>, Sender<()>) {
        let (fail, gate) = channel();
        let (reads, gate) = (AtomicUsize::new(0), Mutex::new(gate));
        (Arc::new(Self { bytes: bytes.to_vec(), reads, gate }), fail)
    }
}

impl PageSource for FailingLate {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Result<ReadNow, PagerError> {
        Ok(ReadNow::WouldBlock)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        if self.reads.fetch_add(1, Ordering::SeqCst) == 0 {
            let _ = self.gate.lock().unwrap().recv_timeout(DEADLINE);
            return Err(PagerError::Protocol("the store did not answer".to_owned()));
        }
        buffer.copy_from_slice(&self.bytes[offset as usize..][..buffer.len()]);
        Ok(())
    }
}
