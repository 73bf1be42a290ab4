//! Answers that are owed: whoever waits for one hears that the session is over where it never comes.

use crate::error::PagerError;

/// An answer that has not been given.
pub(crate) struct Owed<T>(Option<Deliver<T>>);

/// Takes an answer.
pub(crate) type Deliver<T> = Box<dyn FnOnce(Result<T, PagerError>) + Send>;

impl<T> Owed<T> {
    pub(crate) fn new(deliver: Deliver<T>) -> Self {
        Self(Some(deliver))
    }

    /// Gives the answer, once.
    pub(crate) fn give(&mut self, answer: Result<T, PagerError>) {
        if let Some(deliver) = self.0.take() {
            deliver(answer);
        }
    }
}

impl<T> Drop for Owed<T> {
    fn drop(&mut self) {
        self.give(Err(PagerError::SessionOver));
    }
}
