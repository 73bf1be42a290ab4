//! Sessions that were resumed with another source than the one that their label names.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use pager::PagerError;

use crate::channel::Message;
use crate::keeping::{Line, feed_key};
use crate::outbox::SourceKey;

/// Which these are; the holder keeps the same. Whichever thread learns of a change makes it.
#[derive(Clone)]
pub(crate) struct Feeds {
    of: Arc<Mutex<BTreeMap<u64, SourceKey>>>,
    line: Arc<Line>,
}

impl Feeds {
    pub(crate) fn new(line: Arc<Line>) -> Self {
        Self { of: Arc::default(), line }
    }

    pub(crate) fn get(&self, session: u64) -> Option<SourceKey> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner).get(&session).cloned()
    }

    /// As an earlier daemon has had it.
    pub(crate) fn restore(&self, session: u64, source: SourceKey) {
        self.of.lock().unwrap_or_else(PoisonError::into_inner).insert(session, source);
    }

    /// A session has this source from now on, or the one of its label; which it had before.
    ///
    /// # Errors
    ///
    /// A holder that takes nothing; everything is as before.
    pub(crate) fn put(
        &self,
        session: u64,
        source: Option<SourceKey>,
    ) -> Result<Option<SourceKey>, PagerError> {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        let key = feed_key(session);
        let message = match &source {
            Some(source) => Message::Keep { key, value: serde_json::to_value(source).unwrap_or_default() },
            None => Message::Forget { key },
        };
        self.line.say(&message, &[])?;
        Ok(match source {
            Some(source) => of.insert(session, source),
            None => of.remove(&session),
        })
    }

    /// A session is over, and its end has taken the place of what was kept.
    pub(crate) fn forget(&self, session: u64) {
        self.of.lock().unwrap_or_else(PoisonError::into_inner).remove(&session);
    }
}
