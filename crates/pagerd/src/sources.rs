//! Sources that clients have opened: from descriptors that they sent, or the clients themselves.
//!
//! The daemon opens no file. A source stays as long as its client has it open or anything is served from it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, fcntl};
use pager::{
    CallbackOptions, CallbackSource, FileSource, LayeredSource, LostSource, MemorySource, Overlay,
    OverlaySource, PageSource, PagerError, ZeroSource,
};
use uffd::errno_of;

use crate::outbox::{Asks, Outbox, SourceKey};
use crate::protocol::Description;

/// Sources of one client.
const MOST_SOURCES: usize = 4096;
/// Bytes that are taken out of a memfd: of a buffer, of overlays, of an answer.
const MOST_BYTES: u64 = 1 << 30;

struct Open {
    pages: Arc<dyn PageSource>,
    asked: Option<Arc<CallbackSource>>,
    /// Its client will not use it again.
    closed: bool,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Sources {
    open: BTreeMap<SourceKey, Open>,
}

impl Sources {
    /// Whether it is open already: opening the same again, after a connection was lost, changes nothing.
    pub(crate) fn reopen(&mut self, key: &SourceKey) -> bool {
        let Some(open) = self.open.get_mut(key) else { return false };
        open.closed = false;
        true
    }

    /// Opens one.
    pub(crate) fn open(
        &mut self,
        key: SourceKey,
        description: &Description,
        fds: Vec<OwnedFd>,
        outbox: &Arc<Outbox>,
    ) -> Result<(), PagerError> {
        if self.open.keys().filter(|(owner, _)| *owner == key.0).count() >= MOST_SOURCES {
            return Err(PagerError::Exhausted(format!("a client may have {MOST_SOURCES} sources open")));
        }
        let mut fds: Vec<Option<OwnedFd>> = fds.into_iter().map(Some).collect();
        let mut take = |at: usize| {
            fds.get_mut(at).and_then(Option::take).ok_or_else(|| {
                PagerError::Protocol(format!("descriptor {at} did not come with the source that needs it"))
            })
        };
        let mut asked = None;
        let pages: Arc<dyn PageSource> = match description {
            Description::File { fd, path, direct, may_change, size } => {
                let direct = direct.map(&mut take).transpose()?;
                let file = FileSource::of_fds(take(*fd)?, direct, Path::new(path), *size)?;
                Arc::new(if *may_change { file.that_may_change() } else { file })
            }
            Description::Zero { size } => Arc::new(ZeroSource::new(*size)),
            Description::Memory { fd } => Arc::new(MemorySource::new(bytes_of(take(*fd)?)?)),
            Description::Layered { base, diffs } => {
                let base = self.get(&(key.0.clone(), *base))?;
                let open = |(index, diff): (usize, &crate::protocol::Diff)| {
                    let path = PathBuf::from(&diff.path);
                    FileSource::of_fds(take(diff.fd)?, None, &path, None).map_err(|error| PagerError::Layer {
                        index,
                        path,
                        reason: error.to_string(),
                        cause: Some(Box::new(error)),
                    })
                };
                let diffs = diffs.iter().enumerate().map(open).collect::<Result<_, _>>()?;
                Arc::new(LayeredSource::of_files(base, diffs)?)
            }
            Description::Overlay { base, places, fd } => {
                let base = self.get(&(key.0.clone(), *base))?;
                Arc::new(OverlaySource::new(base, overlays(places, &bytes_of(take(*fd)?)?))?)
            }
            Description::Callback { size, chunk, concurrency, cache_bytes } => {
                let options = CallbackOptions {
                    size: *size,
                    chunk: *chunk,
                    concurrency: *concurrency,
                    cache_bytes: *cache_bytes,
                    thread: None,
                };
                let asks = Asks { outbox: Arc::clone(outbox), source: key.clone() };
                let source = Arc::new(CallbackSource::new(options, Box::new(asks))?);
                asked = Some(Arc::clone(&source));
                source
            }
        };
        self.open.insert(key, Open { pages, asked, closed: false });
        Ok(())
    }

    /// One that cannot be opened any more: what has it meets its policy when it wants more.
    pub(crate) fn lose(&mut self, key: SourceKey, why: PagerError) {
        self.open.insert(key, Open { pages: Arc::new(LostSource::new(why)), asked: None, closed: false });
    }

    pub(crate) fn get(&self, key: &SourceKey) -> Result<Arc<dyn PageSource>, PagerError> {
        let open = self.open.get(key);
        open.map(|open| Arc::clone(&open.pages))
            .ok_or_else(|| PagerError::NoImage(format!("source {} is not open", key.1)))
    }

    /// A client has connected again, and these are the sources that it still has.
    pub(crate) fn keep_only(&mut self, owner: &str, numbers: &[u64]) {
        let keys: Vec<SourceKey> = self
            .open
            .keys()
            .filter(|(of, number)| of == owner && !numbers.contains(number))
            .cloned()
            .collect();
        for key in keys {
            self.close(&key, true);
        }
    }

    /// Takes what a client has brought for a request of one of its sources.
    pub(crate) fn answer(&self, key: &SourceKey, request: u64, bytes: Result<OwnedFd, String>) {
        let Some(asked) = self.open.get(key).and_then(|open| open.asked.as_ref()) else { return };
        match bytes.map_err(PagerError::Callback).and_then(bytes_of) {
            Ok(bytes) => asked.answer(request, Ok(&bytes)),
            Err(error) => asked.answer(request, Err(error)),
        }
    }

    /// Its client does not use it any more; with `ended`, nor does it answer for it.
    pub(crate) fn close(&mut self, key: &SourceKey, ended: bool) {
        if let Some(open) = self.open.get_mut(key) {
            open.closed = true;
            if let Some(asked) = open.asked.as_ref().filter(|_| ended) {
                asked.close();
            }
        }
    }

    /// The client is gone: nobody answers for its own sources; files go on.
    pub(crate) fn abandon(&mut self, owner: &str) {
        let keys: Vec<SourceKey> = self.open.keys().filter(|(of, _)| of == owner).cloned().collect();
        for key in keys {
            self.close(&key, true);
        }
    }

    /// Whether there are any that only sessions use.
    pub(crate) fn has_closed(&self) -> bool {
        self.open.values().any(|open| open.closed)
    }

    /// Lets go of what nobody uses any more.
    pub(crate) fn sweep(&mut self) -> Vec<SourceKey> {
        let mut gone = Vec::new();
        // What lies over another goes first: its base is free then, too.
        loop {
            let unused = |(_, open): &(&SourceKey, &Open)| {
                // An asked source is counted twice here.
                open.closed && Arc::strong_count(&open.pages) == 1 + usize::from(open.asked.is_some())
            };
            let Some(key) = self.open.iter().find(unused).map(|(key, _)| key.clone()) else { return gone };
            self.open.remove(&key);
            gone.push(key);
        }
    }
}

fn overlays(places: &[(u64, usize)], bytes: &[u8]) -> Vec<Overlay> {
    let mut at = 0_usize;
    let mut cut = |&(offset, len): &(u64, usize)| {
        let part = bytes.get(at..at.saturating_add(len)).unwrap_or_default().to_vec();
        at = at.saturating_add(len);
        Overlay { offset, bytes: part }
    };
    places.iter().map(&mut cut).collect()
}

/// All of a memfd. Anything else is refused: reading it could wait, and nothing here may.
pub(crate) fn bytes_of(fd: OwnedFd) -> Result<Vec<u8>, PagerError> {
    let failed = |syscall, errno| PagerError::System { syscall, errno };
    if fcntl(&fd, FcntlArg::F_GET_SEALS).is_err() {
        return Err(PagerError::Protocol("bytes have to come in a memfd".to_owned()));
    }
    let file = File::from(fd);
    let len = file.metadata().map_err(|error| failed("fstat", errno_of(&error)))?.len();
    if len > MOST_BYTES {
        return Err(PagerError::Exhausted(format!("{len} bytes in a memfd are more than {MOST_BYTES}")));
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).map_err(|error| failed("pread", errno_of(&error)))?;
    Ok(bytes)
}
