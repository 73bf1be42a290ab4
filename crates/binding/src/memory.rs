//! Mappings, and the checker that asks userfaultfds whether their process lives.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use napi::bindgen_prelude::{Object, Uint8Array};
use napi::{Env, Result};
use napi_derive::napi;
use pager::Announced;
use uffd::liveness::DeadUffdChecker;
use uffd::{AnonymousOptions, FileAccess, FileOptions, Mapping, MappingError, MemfdOptions, Pages, Populate};

use crate::buffers::Mapped;
use crate::environment::{self, MAPPINGS, UFFDS};
use crate::failures;
use crate::jobs::{self, Product};
use crate::values::NativeError;
use crate::views::View;

#[napi(object, object_to_js = false)]
pub struct NativeMappingOptions {
    #[napi(ts_type = "'anonymous' | 'memfd' | 'file'")]
    pub kind: String,
    pub length: Option<f64>,
    pub shared: bool,
    /// 0: ordinary, 1: never joined, 2: transparent; else bytes of a huge page.
    pub pages: f64,
    pub name: String,
    pub sealed: bool,
    pub path: String,
    pub fd: Option<i32>,
    pub offset: f64,
    /// 0: reading, 1: copy on write, 2: shared.
    pub access: u32,
}

#[napi(object, object_from_js = false)]
#[derive(Default)]
pub struct NativeMapping {
    pub error: Option<NativeError>,
    pub handle: f64,
    pub address: f64,
    pub length: f64,
    pub page_size: f64,
    pub fd: Option<i32>,
}

#[napi(catch_unwind)]
pub fn map_memory(env: &Env, options: NativeMappingOptions) -> Result<NativeMapping> {
    let mapping = match try_map(&options) {
        Ok(mapping) => Arc::new(Mapped::new(mapping)),
        Err(error) => return Ok(NativeMapping { error: Some(error), ..NativeMapping::default() }),
    };
    Ok(NativeMapping {
        error: None,
        address: mapping.address() as f64,
        length: mapping.len() as f64,
        page_size: mapping.page_size() as f64,
        fd: mapping.memfd().map(|fd| fd.as_raw_fd()),
        handle: MAPPINGS.insert(mapping, environment::of(env)?),
    })
}

fn try_map(options: &NativeMappingOptions) -> std::result::Result<Mapping, NativeError> {
    let pages = match options.pages as usize {
        0 => Pages::Ordinary,
        1 => Pages::Small,
        2 => Pages::Transparent,
        size => Pages::Huge(size),
    };
    let len = options.length.map(|length| length as usize);
    match options.kind.as_str() {
        "file" => {
            let access = match options.access {
                0 => FileAccess::ReadOnly,
                1 => FileAccess::CopyOnWrite,
                _ => FileAccess::Shared,
            };
            let file = open(options, access).map_err(|error| failures::system("open", &error))?;
            let options = FileOptions { access, offset: options.offset as u64, len };
            Ok(Mapping::of_file(file, options)?)
        }
        "memfd" => {
            let (private, fixed_size) = (!options.shared, options.sealed);
            let memfd = MemfdOptions { name: &options.name, private, fixed_size, pages };
            Ok(Mapping::with_memfd(len.unwrap_or(0), &memfd)?)
        }
        _ => {
            let anonymous = AnonymousOptions { shared: options.shared, pages };
            Ok(Mapping::anonymous(len.unwrap_or(0), anonymous)?)
        }
    }
}

fn open(options: &NativeMappingOptions, access: FileAccess) -> std::io::Result<OwnedFd> {
    if let Some(fd) = options.fd {
        if fd < 0 {
            return Err(std::io::Error::from_raw_os_error(libc::EBADF));
        }
        // SAFETY: only borrowed for the call below, which refuses a number that is no open descriptor.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        return borrowed.try_clone_to_owned();
    }
    let shared = access == FileAccess::Shared;
    File::options().read(true).write(shared).open(Path::new(&options.path)).map(OwnedFd::from)
}

/// Unmaps it when the last job that uses it is done.
#[napi(catch_unwind)]
pub fn unmap_memory(handle: f64) {
    let _calling = Announced::new();
    drop(MAPPINGS.remove(handle));
}

pub(crate) fn mapping(handle: f64) -> std::result::Result<Arc<Mapped>, NativeError> {
    MAPPINGS.get(handle).ok_or_else(|| failures::closed("mapping"))
}

#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn read_memory<'env>(env: &'env Env, handle: f64, offset: f64, len: f64) -> Result<Object<'env>> {
    let mapping = mapping(handle);
    jobs::run(env, &jobs::ACCESSES, move || {
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(len as usize)
            .map_err(|_| failures::system("malloc", &std::io::Error::from_raw_os_error(libc::ENOMEM)))?;
        bytes.resize(len as usize, 0);
        mapping?.read_checked(offset as usize, &mut bytes)?;
        Ok(Product { bytes: Some(bytes), ..Product::default() })
    })
}

#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn write_memory<'env>(
    env: &'env Env,
    handle: f64,
    offset: f64,
    #[napi(ts_arg_type = "Uint8Array")] bytes: View,
) -> Result<Object<'env>> {
    let mapping = mapping(handle);
    let mut copy = vec![0_u8; bytes.len];
    // SAFETY: a view is valid for its length during the call; the copy is ours. Others may write the view meanwhile, which
    // mixes bytes and breaks nothing.
    unsafe { std::ptr::copy_nonoverlapping(bytes.data, copy.as_mut_ptr(), bytes.len) };
    jobs::run(env, &jobs::ACCESSES, move || {
        mapping?.write_checked(offset as usize, &copy)?;
        Ok(Product::default())
    })
}

/// On this thread: it waits here for a page that is missing.
#[napi(catch_unwind)]
pub fn read_memory_sync(
    handle: f64,
    offset: f64,
    #[napi(ts_arg_type = "Uint8Array")] into: View,
) -> Option<NativeError> {
    let _calling = Announced::new();
    // SAFETY: a view is valid for its length during the call; it may lie in a mapping, this one too.
    let read = |mapping: Arc<Mapped>| unsafe { mapping.read_to(offset as usize, into.data, into.len) };
    mapping(handle).and_then(|mapping| Ok(read(mapping)?)).err()
}

#[napi(catch_unwind)]
pub fn write_memory_sync(
    handle: f64,
    offset: f64,
    #[napi(ts_arg_type = "Uint8Array")] from: View,
) -> Option<NativeError> {
    let _calling = Announced::new();
    // SAFETY: as in `read_memory_sync`.
    let write = |mapping: Arc<Mapped>| unsafe { mapping.write_from(offset as usize, from.data, from.len) };
    mapping(handle).and_then(|mapping| Ok(write(mapping)?)).err()
}

#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn discard_memory<'env>(env: &'env Env, handle: f64, offset: f64, len: f64) -> Result<Object<'env>> {
    let mapping = mapping(handle);
    jobs::run(env, &jobs::ACCESSES, move || {
        mapping?.discard(offset as usize, len as usize)?;
        Ok(Product::default())
    })
}

#[napi(catch_unwind)]
pub fn discard_memory_sync(handle: f64, offset: f64, len: f64) -> Option<NativeError> {
    let _calling = Announced::new();
    mapping(handle).and_then(|mapping| Ok(mapping.discard(offset as usize, len as usize)?)).err()
}

#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn populate_memory<'env>(
    env: &'env Env,
    handle: f64,
    offset: f64,
    len: f64,
    write: bool,
) -> Result<Object<'env>> {
    let mapping = mapping(handle);
    let what_for = if write { Populate::ForWriting } else { Populate::ForReading };
    jobs::run(env, &jobs::ACCESSES, move || {
        mapping?.populate(offset as usize, len as usize, what_for)?;
        Ok(Product::default())
    })
}

#[napi(object, object_from_js = false)]
pub struct NativeResidency {
    pub error: Option<NativeError>,
    pub pages: Option<Uint8Array>,
}

#[napi(catch_unwind)]
pub fn memory_residency(handle: f64, offset: f64, len: f64) -> NativeResidency {
    let states = mapping(handle).and_then(|mapping| Ok(mapping.residency(offset as usize, len as usize)?));
    match states {
        Ok(states) => {
            let bytes: Vec<u8> = states.into_iter().map(|state| state as u8).collect();
            NativeResidency { error: None, pages: Some(bytes.into()) }
        }
        Err(error) => NativeResidency { error: Some(error), pages: None },
    }
}

#[napi]
pub struct NativeChecker {
    checker: Arc<DeadUffdChecker>,
}

#[napi]
impl NativeChecker {
    #[napi(factory, catch_unwind)]
    pub fn create() -> Result<Self> {
        let failed = |error: MappingError| napi::Error::from_reason(error.to_string());
        Ok(Self { checker: Arc::new(DeadUffdChecker::new().map_err(failed)?) })
    }

    #[napi(getter, catch_unwind)]
    pub fn address(&self) -> f64 {
        self.checker.range().start as f64
    }

    #[napi(catch_unwind)]
    pub fn register(&self, handle: f64) -> Option<NativeError> {
        match UFFDS.get(handle) {
            Some(uffd) => match crate::operations::guarded(&uffd) {
                Ok(()) => self.checker.register(&uffd).err().map(NativeError::from),
                Err(error) => Some(error),
            },
            None => Some(failures::closed("userfaultfd")),
        }
    }

    #[napi(catch_unwind)]
    pub fn is_dead(&self, handle: f64) -> bool {
        UFFDS.get(handle).is_some_and(|uffd| self.checker.is_dead(&uffd))
    }

    #[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
    pub fn reset<'env>(&self, env: &'env Env) -> Result<Object<'env>> {
        let checker = Arc::clone(&self.checker);
        jobs::run(env, &jobs::ACCESSES, move || {
            checker.reset()?;
            Ok(Product::default())
        })
    }
}

/// Bytes of an ordinary page.
#[napi(catch_unwind)]
pub fn page_size() -> f64 {
    uffd::page_size() as f64
}
