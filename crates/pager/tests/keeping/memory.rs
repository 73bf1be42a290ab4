//! Memory that a process of its own serves, the test being its holder; and its record, as it lies.
#![allow(unreachable_pub, reason = "a module of a test program is its own crate's")]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;

use pager::{Notice, Pager, PagerError, PagerOptions, SessionInfo, Successor};
use uffd::liveness::PidFd;
use uffd::{EventBuffer, Features, FileAccess, FileOptions, Mapping, Modes, Userfaultfd, Words};

use crate::support::area::{Area, Made, all_events, new_uffd, register, started};
use crate::support::kept::{Kept, PagerProcess, Source, to_serve};
use crate::support::{PAGE, image, told};

/// Where things are in a record, in words. Not to be changed: an older pager's record is taken over by a newer one.
pub mod at {
    pub const VERSION: usize = 1;
    pub const BYTES: usize = 2;
    pub const PAGES: usize = 4;
    pub const SESSION: usize = 7;
    pub const STATIC_END: usize = 9;
    pub const OWNER: usize = 9;
    pub const READS: usize = 11;
    pub const MAP: usize = 12;
    pub const TABLE: usize = 255;
    pub const RING: usize = 256;
    pub const RING_WORDS: usize = 256;
    /// Behind the head: the bitmaps.
    pub const BITMAPS: usize = 512;
}

/// An area that a process of its own serves.
pub struct Served {
    pub area: Area,
    pub bytes: Vec<u8>,
    pub uffd: Userfaultfd,
    pub process: PagerProcess,
    pub kept: Kept,
}

/// Serves private memory from an image that is at hand.
pub fn served(
    pages: usize,
    features: Features,
    modes: Modes,
    adjust: impl FnOnce(&mut pager::KeptSession),
) -> Option<Served> {
    begin(pages, (features, modes), (Source::AtHand(pages), None), adjust)
}

/// The same from any source, and of any process.
pub fn served_by(
    pages: usize,
    source: Source,
    of: Option<&PidFd>,
    adjust: impl FnOnce(&mut pager::KeptSession),
) -> Option<Served> {
    begin(pages, (all_events(), Modes::MISSING), (source, of), adjust)
}

fn begin(
    pages: usize,
    (features, modes): (Features, Modes),
    (source, of): (Source, Option<&PidFd>),
    adjust: impl FnOnce(&mut pager::KeptSession),
) -> Option<Served> {
    let uffd: Userfaultfd = new_uffd(features)?;
    let area = Area::new(Made::Private, pages);
    register(&uffd, area, modes);
    let process = PagerProcess::start("pager_process");
    let mut session = to_serve(area);
    adjust(&mut session);
    process.serve(session, source, &uffd, of);
    let kept = process.kept();
    assert_eq!(process.started(), (kept.session.id, 0));
    let bytes = if source == Source::AtHand(pages) { image(pages) } else { Vec::new() };
    Some(Served { area, bytes, uffd, process, kept })
}

pub fn page(bytes: &[u8], page: usize) -> &[u8] {
    &bytes[page * PAGE..(page + 1) * PAGE]
}

/// A pager of this process that has taken a session over.
pub struct Resumed {
    pub pager: Pager,
    pub info: Arc<SessionInfo>,
    pub notices: Receiver<Notice>,
}

/// Takes a session over in this process.
pub fn resume(kept: &Kept, pages: usize) -> Resumed {
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (outcome, notices) = try_resume(&pager, kept, pages);
    outcome.unwrap();
    let info = started(&notices);
    Resumed { pager, info, notices }
}

pub fn try_resume(pager: &Pager, kept: &Kept, pages: usize) -> (Result<(), PagerError>, Receiver<Notice>) {
    let (observer, notices) = told();
    let successor = Successor { source: Source::AtHand(pages).open(), observer, server: None, replay: None };
    (pager.resume_session(&kept.session, kept.descriptors(), successor), notices)
}

impl Kept {
    /// All words of its record.
    pub fn words(&self) -> Words {
        let options = FileOptions { access: FileAccess::Shared, ..FileOptions::default() };
        let mapping = Arc::new(Mapping::of_file(self.record.try_clone().unwrap(), options).unwrap());
        Words::of_mapping(&mapping, 0, mapping.len() / 8).unwrap()
    }

    /// Those of its ring.
    pub fn ring(&self) -> Words {
        let options = FileOptions { access: FileAccess::Shared, ..FileOptions::default() };
        let mapping = Arc::new(Mapping::of_file(self.record.try_clone().unwrap(), options).unwrap());
        Words::of_mapping(&mapping, at::RING * 8, at::RING_WORDS).unwrap()
    }

    /// Reads messages into its ring, as its pager does, and nothing more: it was killed then. How many.
    pub fn read_and_die(&self, uffd: &Userfaultfd) -> usize {
        uffd.read_events(&mut EventBuffer::in_words(self.ring())).unwrap()
    }

    /// The same, but whoever shares its table is alive: descriptors of children stay open.
    pub fn read_and_leave(&self, uffd: &Userfaultfd) -> usize {
        let mut buffer = EventBuffer::in_words(self.ring());
        let read = uffd.read_events(&mut buffer).unwrap();
        // What it drops it closes.
        std::mem::forget(buffer);
        read
    }
}

pub fn get(words: &Words, index: usize) -> u64 {
    words[index].load(Ordering::Relaxed)
}

pub fn put(words: &Words, index: usize, value: u64) {
    words[index].store(value, Ordering::Relaxed);
}
