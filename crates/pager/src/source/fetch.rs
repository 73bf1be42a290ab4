//! A read whose bytes come later, from whoever can get them.

use std::sync::{Arc, Weak};

use crate::error::PagerError;
use crate::workers::{Completion, Deliver, Job};

/// Bytes that somebody is to bring: filled and completed on any thread, once. Dropping it is a failure, so that nobody waits
/// for ever for what was forgotten.
pub struct Fetch {
    /// There until it is completed or given back.
    job: Option<Job>,
    deliver: Deliver,
    demand: bool,
    /// Gone when the session has given the read up; none where nobody can.
    wanted: Option<Weak<()>>,
}

impl Fetch {
    pub(crate) fn new(job: Job, deliver: Deliver, demand: bool) -> Self {
        Self { job: Some(job), deliver, demand, wanted: None }
    }

    /// Wanted as long as this is there.
    pub(crate) fn wanted_with(mut self, wanted: &Arc<()>) -> Self {
        self.wanted = Some(Arc::downgrade(wanted));
        self
    }

    /// Whether somebody would still do anything with the bytes.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.wanted.as_ref().is_none_or(|wanted| wanted.strong_count() > 0)
    }

    /// Where the first byte is in the source.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.job.as_ref().map_or(0, |job| job.offset)
    }

    /// Bytes wanted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.job.as_ref().map_or(0, |job| job.buffer.len())
    }

    /// Whether no bytes are wanted. Never so for a read of a session.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a thread waits for these bytes.
    #[must_use]
    pub fn is_demand(&self) -> bool {
        self.demand
    }

    /// Where the bytes go.
    pub fn buffer(&mut self) -> &mut [u8] {
        self.job.as_mut().map_or(&mut [], |job| &mut job.buffer)
    }

    /// The same read with a step after it, on the thread that completes it, once the bytes are there.
    #[must_use]
    pub(crate) fn then(mut self, step: impl Fn(u64, &mut [u8]) + Send + Sync + 'static) -> Self {
        let deliver = Arc::clone(&self.deliver);
        let wrapped: Deliver = Arc::new(move |mut completion: Completion| {
            if completion.result.is_ok() {
                step(completion.job.offset, &mut completion.job.buffer);
            }
            deliver(completion);
        });
        Self { job: self.job.take(), deliver: wrapped, demand: self.demand, wanted: self.wanted.take() }
    }

    /// The bytes are there, all of them; or they cannot be had.
    pub fn complete(mut self, result: Result<(), PagerError>) {
        self.finish(result);
    }

    fn finish(&mut self, result: Result<(), PagerError>) {
        if let Some(job) = self.job.take() {
            (self.deliver)(Completion { job, result });
        }
    }

    /// For a worker, because the source does not fetch.
    pub(crate) fn into_job(mut self) -> Option<Job> {
        self.job.take()
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.finish(Err(PagerError::Internal("a read of the source was dropped unanswered".to_owned())));
    }
}

impl std::fmt::Debug for Fetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fetch").field("offset", &self.offset()).field("len", &self.len()).finish()
    }
}
