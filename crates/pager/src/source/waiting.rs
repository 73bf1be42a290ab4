//! Reading, on a worker, of a source behind another: also of one that has to be asked and answers on a thread of its own.

use std::sync::Arc;
use std::sync::mpsc::channel;

use super::{Fetch, PageSource};
use crate::error::PagerError;
use crate::workers::{Completion, Deliver, Job};

/// Fills `buffer` by [`PageSource::fetch`], waiting for the answer, or by [`PageSource::read`] where the source does not
/// fetch. A fetch that nobody answers completes with an error when it is dropped, so this ends when it does.
///
/// # Errors
///
/// Those of the source.
pub fn read(source: &Arc<dyn PageSource>, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
    let (sender, answer) = channel();
    let deliver: Deliver = Arc::new(move |completion: Completion| {
        // Whoever waits for it is there until it comes.
        let _ = sender.send((completion.job.buffer, completion.result));
    });
    let job = Job {
        // Of no session: what is delivered goes to the channel.
        session: 0,
        number: 0,
        pages: 0..0,
        offset,
        buffer: vec![0; buffer.len()],
        source: Arc::clone(source),
    };
    if let Err(unfetched) = source.fetch(Fetch::new(job, deliver, true)) {
        drop(unfetched.into_job());
        return source.read(offset, buffer);
    }
    let lost = || PagerError::Internal("a read of the source was lost".to_owned());
    let (bytes, result) = answer.recv().map_err(|_| lost())?;
    result?;
    if bytes.len() != buffer.len() {
        return Err(lost());
    }
    buffer.copy_from_slice(&bytes);
    Ok(())
}
