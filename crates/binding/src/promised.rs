//! Promises that the pager's thread keeps.

use napi::bindgen_prelude::{Object, ToNapiValue};
use napi::{Env, JsDeferred, Result};
use pager::PagerError;

/// An answer that can tell why there is none.
pub(crate) trait Failed: ToNapiValue + Send + 'static {
    fn failed(error: &PagerError) -> Self;
}

type Resolver<T> = Box<dyn FnOnce(Env) -> Result<T>>;

/// A promise of an answer. Dropped without one, by a pager that has ended, it tells that the session is over.
pub(crate) struct Promised<T: Failed>(Option<JsDeferred<T, Resolver<T>>>);

impl<T: Failed> Promised<T> {
    pub(crate) fn new(env: &Env) -> Result<(Self, Object<'_>)> {
        let (deferred, promise) = env.create_deferred()?;
        Ok((Self(Some(deferred)), promise))
    }

    pub(crate) fn keep(&mut self, answer: T) {
        if let Some(deferred) = self.0.take() {
            deferred.resolve(Box::new(move |_| Ok(answer)));
        }
    }
}

impl<T: Failed> Drop for Promised<T> {
    fn drop(&mut self) {
        if self.0.is_some() {
            self.keep(T::failed(&PagerError::SessionOver));
        }
    }
}
