//! What a pager in a process of its own is given: sockets, bytes, and what sources bring that live here.

use std::os::fd::{IntoRawFd, OwnedFd};
use std::path::Path;

use napi::bindgen_prelude::Object;
use napi::{Env, Result};
use napi_derive::napi;
use pager::{Listener, PagerError};
use uffd::fd_passing::in_memfd;

use crate::environment::SOURCES;
use crate::failures;
use crate::jobs::{self, Product};
use crate::sources::copied;
use crate::values::NativeError;
use crate::views::View;

/// A descriptor that is JavaScript's, or why there is none.
#[napi(object, object_from_js = false)]
pub struct NativeDescriptor {
    pub error: Option<NativeError>,
    pub fd: Option<i32>,
}

fn given(descriptor: std::result::Result<OwnedFd, NativeError>) -> NativeDescriptor {
    match descriptor {
        Ok(fd) => NativeDescriptor { error: None, fd: Some(fd.into_raw_fd()) },
        Err(error) => NativeDescriptor { error: Some(error), fd: None },
    }
}

/// A private listening socket at a path, which stays when the descriptor is closed.
#[napi(catch_unwind)]
pub fn bind_listener(path: String, peer_uid: Option<u32>) -> NativeDescriptor {
    let bound = Listener::bind(Path::new(&path), peer_uid).map_err(|error| NativeError::from(&error));
    given(bound.and_then(|listener| listener.into_fd().map_err(|error| failures::system("fcntl", &error))))
}

/// The bytes of a view, copied to a memfd.
#[napi(catch_unwind)]
pub fn bytes_in_memfd(#[napi(ts_arg_type = "Uint8Array")] bytes: View) -> NativeDescriptor {
    given(in_memfd(c"uffd-bytes", &copied(&bytes)).map_err(|error| failures::system("memfd_create", &error)))
}

/// Bytes of a source in a memfd (`fds`). Waits for them on another thread.
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn read_source(env: &Env, handle: f64, offset: f64, length: f64) -> Result<Object<'_>> {
    let source = SOURCES.get(handle);
    jobs::run(env, &jobs::READS, move || {
        let closed = || NativeError::from(&PagerError::NoImage("the source is closed".to_owned()));
        let source = source.ok_or_else(closed)?;
        let mut bytes = vec![0; length as usize];
        pager::read_source(&source.pages, offset as u64, &mut bytes)
            .map_err(|error| NativeError::from(&error))?;
        let memfd =
            in_memfd(c"uffd-bytes", &bytes).map_err(|error| failures::system("memfd_create", &error))?;
        Ok(Product { fds: Some(vec![memfd]), ..Product::default() })
    })
}
