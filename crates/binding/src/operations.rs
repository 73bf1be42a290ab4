//! The operations of a userfaultfd: a number in, a number out (bytes, or -errno). TypeScript makes errors of them.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use napi::Env;
use napi_derive::napi;
use pager::Guarded;
use uffd::regions::{RegionsError, Target, register_regions, unregister_regions};
use uffd::{
    ContinueOptions, CopyOptions, Event, EventBuffer, Fault, FaultKind, Ioctls, Modes, MoveOptions,
    UffdError, Userfaultfd,
};

use crate::environment::{self, UFFDS};
use crate::failures;
use crate::values::NativeError;
use crate::views::View;

/// Bits of `mode`, the same for every operation.
const DONT_WAKE: u32 = 1;
pub(crate) const PROTECT: u32 = 2;
const SOURCE_HOLES: u32 = 4;
/// From here on `mode` has the logarithm of the page size: one argument less for every call.
const PAGE_SHIFT: u32 = 8;

pub(crate) fn negative(errno: i32) -> f64 {
    -f64::from(errno)
}

/// What an operation that fills came to. A page in the way is woken: the kernel leaves its waiters asleep.
fn filled(
    handle: f64,
    range: (f64, f64),
    mode: u32,
    act: impl FnOnce(&Userfaultfd) -> Result<(), UffdError>,
) -> f64 {
    let Some(uffd) = UFFDS.get(handle) else { return negative(libc::EBADF) };
    let result = act(&uffd);
    // By itself: the table of jumps of a long match costs more than all else here.
    if result.is_ok() {
        return range.1;
    }
    match result {
        Ok(()) => range.1,
        Err(UffdError::PartiallyCopied { done }) => done as f64,
        Err(UffdError::PageExist) => {
            if mode & DONT_WAKE == 0 {
                let _ = uffd.wake(range.0 as u64, 1 << (mode >> PAGE_SHIFT));
            }
            negative(libc::EEXIST)
        }
        Err(error) => negative(error.errno().unwrap_or(libc::EIO)),
    }
}

fn copied(handle: f64, dst: f64, src: *const u8, len: usize, mode: u32) -> f64 {
    let options = CopyOptions { wake: mode & DONT_WAKE == 0, write_protect: mode & PROTECT != 0 };
    filled(handle, (dst, len as f64), mode, |uffd| {
        // SAFETY: TypeScript passes a view of `len` bytes, or an address that the kernel checks; the kernel reads it, so
        // whoever writes there meanwhile changes bytes and breaks nothing. The destination is memory of the package's own
        // mappings or of another process: no reference to it exists.
        unsafe { uffd.copy(dst as u64, src, len, options) }
    })
}

pub(crate) fn copy(handle: f64, dst: f64, source: &View, mode: u32) -> f64 {
    copied(handle, dst, source.data, source.len, mode)
}

/// From a part of a view, for what is left of a bulk copy.
pub(crate) fn copy_part(handle: f64, dst: f64, source: &View, from: f64, mode: u32) -> f64 {
    let from = from as usize;
    if from >= source.len {
        return negative(libc::EINVAL);
    }
    copied(handle, dst, source.data.wrapping_add(from), source.len - from, mode)
}

pub(crate) fn copy_from(handle: f64, dst: f64, source: f64, len: f64, mode: u32) -> f64 {
    copied(handle, dst, source as u64 as *const u8, len as usize, mode)
}

pub(crate) fn zero(handle: f64, start: f64, len: f64, mode: u32) -> f64 {
    filled(handle, (start, len), mode, |uffd| uffd.zero(start as u64, len as u64, mode & DONT_WAKE == 0))
}

/// Of huge pages, whose size is in `mode`.
pub(crate) fn zero_huge(handle: f64, start: f64, len: f64, mode: u32) -> f64 {
    let (page_size, wake) = (1 << (mode >> PAGE_SHIFT), mode & DONT_WAKE == 0);
    filled(handle, (start, len), mode, |uffd| uffd.zero_huge(start as u64, len as u64, page_size, wake))
}

pub(crate) fn poison(handle: f64, start: f64, len: f64, mode: u32) -> f64 {
    filled(handle, (start, len), mode, |uffd| uffd.poison(start as u64, len as u64, mode & DONT_WAKE == 0))
}

pub(crate) fn continue_pages(handle: f64, start: f64, len: f64, mode: u32) -> f64 {
    let options = ContinueOptions { wake: mode & DONT_WAKE == 0, write_protect: mode & PROTECT != 0 };
    filled(handle, (start, len), mode, |uffd| uffd.continue_pages(start as u64, len as u64, options))
}

pub(crate) fn move_pages(handle: f64, dst: f64, source: f64, len: f64, mode: u32) -> f64 {
    let options = MoveOptions { wake: mode & DONT_WAKE == 0, allow_source_holes: mode & SOURCE_HOLES != 0 };
    filled(handle, (dst, len), mode, |uffd| {
        // SAFETY: both sides are memory of the package's own mappings, of which no reference exists.
        unsafe { uffd.move_pages(dst as u64, source as u64, len as u64, options) }
    })
}

pub(crate) fn write_protect(handle: f64, start: f64, len: f64, mode: u32) -> f64 {
    let (protect, wake) = (mode & PROTECT != 0, mode & DONT_WAKE == 0);
    filled(handle, (start, len), DONT_WAKE, |uffd| {
        uffd.write_protect(start as u64, len as u64, protect, wake)
    })
}

pub(crate) fn wake(handle: f64, start: f64, len: f64) -> f64 {
    filled(handle, (start, len), DONT_WAKE, |uffd| uffd.wake(start as u64, len as u64))
}

#[napi(catch_unwind)]
pub fn uffd_is_dead(handle: f64) -> bool {
    UFFDS.get(handle).is_some_and(|uffd| uffd.is_dead())
}

#[napi(object, object_from_js = false)]
pub struct NativeRegistered {
    pub error: Option<NativeError>,
    pub ioctls: Vec<String>,
}

/// The memory of another process is the caller's to read for; only what is made here is guarded.
pub(crate) fn guarded(uffd: &Guarded) -> Result<(), NativeError> {
    match uffd.origin() {
        Some(_) => uffd.guard().map_err(|error| failures::system("pthread_create", &error)),
        None => Ok(()),
    }
}

fn modes(bits: u32) -> Modes {
    Modes::from_bits_truncate(u64::from(bits))
}

#[napi(catch_unwind)]
pub fn uffd_register(handle: f64, start: f64, len: f64, mode: u32, require: Vec<String>) -> NativeRegistered {
    let failed = |error| NativeRegistered { error: Some(error), ioctls: Vec::new() };
    let Some(uffd) = UFFDS.get(handle) else { return failed(failures::closed("userfaultfd")) };
    let require: Ioctls = require.iter().filter_map(|name| Ioctls::of_name(name)).collect();
    if let Err(error) = guarded(&uffd) {
        return failed(error);
    }
    // SAFETY: memory of the package's own mappings, of which no reference exists, or of another process.
    match unsafe { uffd.register_requiring(start as u64, len as u64, modes(mode), require) } {
        Ok(ioctls) => NativeRegistered { error: None, ioctls: ioctls.names() },
        Err(error) => failed(error.into()),
    }
}

#[napi(catch_unwind)]
pub fn uffd_unregister(handle: f64, start: f64, len: f64) -> Option<NativeError> {
    match UFFDS.get(handle) {
        Some(uffd) => uffd.unregister(start as u64, len as u64).err().map(NativeError::from),
        None => Some(failures::closed("userfaultfd")),
    }
}

/// Ranges of one userfaultfd: start, length, start, length, …
#[napi(object, object_to_js = false)]
pub struct NativeTarget {
    pub handle: f64,
    pub ranges: Vec<f64>,
}

#[napi(object, object_from_js = false)]
pub struct NativeRegions {
    pub error: Option<NativeError>,
    /// Targets whose process is gone, by index.
    pub dead: Vec<u32>,
    /// The target that was refused, and how many more ranges were.
    pub refused: Option<u32>,
    pub others: u32,
}

type Regions = Vec<(Arc<Guarded>, Vec<std::ops::Range<u64>>)>;

fn targets(given: &[NativeTarget]) -> Result<Regions, NativeError> {
    let target = |target: &NativeTarget| {
        let uffd = UFFDS.get(target.handle).ok_or_else(|| failures::closed("userfaultfd"))?;
        guarded(&uffd)?;
        let (pairs, _) = target.ranges.as_chunks::<2>();
        let ranges = pairs.iter().map(|&[start, len]| start as u64..start as u64 + len as u64);
        Ok((uffd, ranges.collect()))
    };
    given.iter().map(target).collect()
}

fn regions(result: Result<Vec<usize>, RegionsError>) -> NativeRegions {
    let indices = |list: Vec<usize>| list.into_iter().map(|index| index as u32).collect();
    match result {
        Ok(dead) => NativeRegions { error: None, dead: indices(dead), refused: None, others: 0 },
        Err(error) => NativeRegions {
            refused: Some(error.refused.target as u32),
            others: error.others.len() as u32,
            error: Some(NativeError { message: error.to_string(), ..error.refused.error.into() }),
            dead: indices(error.dead),
        },
    }
}

fn on_regions(
    given: &[NativeTarget],
    act: impl for<'a> FnOnce(&[Target<'a>]) -> Result<Vec<usize>, RegionsError>,
) -> NativeRegions {
    match targets(given) {
        Ok(owned) => {
            let borrowed: Vec<_> = owned.iter().map(|(uffd, ranges)| (&***uffd, ranges.as_slice())).collect();
            regions(act(&borrowed))
        }
        Err(error) => NativeRegions { error: Some(error), dead: Vec::new(), refused: None, others: 0 },
    }
}

#[napi(catch_unwind)]
pub fn uffd_register_regions(given: Vec<NativeTarget>, mode: u32) -> NativeRegions {
    // SAFETY: as in `uffd_register`.
    on_regions(&given, |targets| unsafe { register_regions(targets, modes(mode)) })
}

#[napi(catch_unwind)]
pub fn uffd_unregister_regions(given: Vec<NativeTarget>) -> NativeRegions {
    on_regions(&given, unregister_regions)
}

/// Waits until there is something to read: 1, or 0 when `milliseconds` (at most 100) have passed, or -errno.
pub(crate) fn wait(uffd: &Guarded, milliseconds: u32) -> f64 {
    if uffd.has_kept() {
        return 1.0;
    }
    let mut poll = libc::pollfd {
        fd: std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&**uffd)),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one structure, which lives across the call.
    let ready = unsafe { libc::poll(&raw mut poll, 1, milliseconds.min(100) as libc::c_int) };
    if ready < 0 {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        return if errno == libc::EINTR { 0.0 } else { negative(errno) };
    }
    // POLLERR: a blocking descriptor cannot be polled.
    if poll.revents & libc::POLLERR != 0 { negative(libc::EOPNOTSUPP) } else { f64::from(ready) }
}

/// Words of a message: kind and flags, then up to three of its own.
const WORDS: usize = 4;

thread_local! {
    /// For the next read of this thread; empty between two of them.
    static BUFFER: RefCell<EventBuffer> = RefCell::new(EventBuffer::new(64));
}

/// Reads messages into words, and waits for some for at most `milliseconds` (100 at most; not at all with 0) if there are none:
/// how many, or -errno; ESRCH where none will come, because the process is gone.
pub(crate) fn take_events(env: &Env, handle: f64, words: &View, milliseconds: f64) -> f64 {
    let Some(uffd) = UFFDS.get(handle) else { return negative(libc::EBADF) };
    let count = read_events(env, &uffd, words);
    if count != 0.0 || milliseconds <= 0.0 {
        return count;
    }
    let until = Instant::now() + Duration::from_millis(milliseconds as u64);
    let mut left = milliseconds as u32;
    loop {
        let ready = wait(&uffd, left);
        let count = if ready > 0.0 { read_events(env, &uffd, words) } else { ready };
        if count != 0.0 {
            return count;
        }
        // Interrupted, or somebody else has read it.
        match until.saturating_duration_since(Instant::now()) {
            // Asked only now: the question is a system call, and this is where it is due.
            Duration::ZERO => return if uffd.is_dead() { negative(libc::ESRCH) } else { 0.0 },
            rest => left = rest.as_millis() as u32 + 1,
        }
    }
}

fn read_events(env: &Env, uffd: &Guarded, words: &View) -> f64 {
    if uffd.is_handled() {
        return negative(libc::EBUSY);
    }
    let most = words.len / size_of::<u64>() / WORDS;
    let mut at = words.data.cast::<u64>();
    let read = BUFFER.with_borrow_mut(|buffer| {
        if buffer.capacity() != most {
            *buffer = EventBuffer::new(most);
        }
        uffd.take_events(most, buffer, |event| {
            let message = message_of(env, event);
            // SAFETY: there are at most as many messages as the view has room for, and a BigUint64Array is aligned for its
            // words.
            unsafe { std::ptr::copy_nonoverlapping(message.as_ptr(), at, WORDS) };
            at = at.wrapping_add(WORDS);
        })
    });
    match read {
        Ok(count) => count as f64,
        Err(error) => negative(error.errno().unwrap_or(libc::EIO)),
    }
}

/// Kinds as TypeScript reads them: 0 to 2 faults (missing, write-protect, minor), 16 added for a write; then the rest.
fn message_of(env: &Env, event: Event) -> [u64; WORDS] {
    let of_fault = |fault: &Fault| {
        let kind = match fault.kind {
            FaultKind::Missing => 0,
            FaultKind::WriteProtect => 1,
            FaultKind::Minor => 2,
        };
        let write = if fault.write { 16 } else { 0 };
        [kind | write, fault.address, u64::from(fault.thread_id.unwrap_or(0)), 0]
    };
    // By itself, as above.
    if let Event::Fault(fault) = &event {
        return of_fault(fault);
    }
    match event {
        Event::Fault(fault) => of_fault(&fault),
        // An environment that ends takes no more children: they are closed.
        Event::Fork { child } => {
            [3, environment::keep(env, child).map_or(u64::MAX, |handle| handle as u64), 0, 0]
        }
        Event::Remap { from, to, len } => [4, from, to, len],
        Event::Remove { start, end } => [5, start, end, 0],
        Event::Unmap { start, end } => [6, start, end, 0],
        Event::Unknown { event } => [7, u64::from(event), 0, 0],
    }
}
