//! Faults that JavaScript answers: handlers by number, and what crosses for each batch.

use std::cell::{Cell, RefCell};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use napi::bindgen_prelude::Function;
use napi::{Env, Result};
use napi_derive::napi;
use pager::{
    Answered, Area, Delivery, FailurePolicy, Handler, HandlerOptions, Joining, OpenFault, Run, SelfFault,
};
use uffd::liveness::PidFd;
use uffd::{ContinueOptions, CopyOptions, Event, UffdError, Userfaultfd};

use crate::environment::{self, HANDLERS, UFFDS};
use crate::failures;
use crate::operations::{PROTECT, negative};
use crate::polling::Polling;
use crate::stack;
use crate::thread;
use crate::values::NativeError;
use crate::views::View;
use crate::waiting::copy;

/// A handler, and how it calls JavaScript.
pub(crate) struct Handling {
    pub(crate) handler: Arc<Handler>,
    polling: Mutex<Option<Polling>>,
}

impl Handling {
    /// Only whole values are put in and taken out under this lock.
    fn polling(&self) -> MutexGuard<'_, Option<Polling>> {
        self.polling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is called any more.
    pub(crate) fn stop(&self) {
        if let Some(mut polling) = self.polling().take() {
            polling.stop();
        }
    }
}

thread_local! {
    /// The one that was asked for last: a thread mostly has one, and asks for it twice a fault.
    static LAST: RefCell<Option<(f64, Arc<Handling>)>> = const { RefCell::new(None) };
}

/// With a handler of this thread; nothing where it has ended.
fn with<R>(handle: f64, act: impl FnOnce(&Handling) -> R) -> Option<R> {
    LAST.with_borrow_mut(|last| {
        if !matches!(last, Some((known, _)) if *known == handle) {
            *last = HANDLERS.get(handle).map(|handling| (handle, handling));
        }
        last.as_ref().map(|(_, handling)| act(handling))
    })
}

/// One of this thread ends.
pub(crate) fn forget_last() {
    drop(LAST.take());
}

#[napi(object, object_to_js = false)]
pub struct NativeHandlerOptions {
    /// Milliseconds.
    pub deadline: f64,
    pub kill: bool,
    pub zero_self_faults: bool,
    /// Have a thread notify although the event loop could.
    pub by_thread: bool,
    pub pidfd: Option<i32>,
}

#[napi(object, object_from_js = false)]
pub struct NativeHandler {
    pub error: Option<NativeError>,
    pub handle: f64,
    /// `armHandler` is to be called when everything was read.
    pub needs_arming: bool,
}

/// Takes the messages of a userfaultfd over: `notify` is called on this thread when there are some.
#[napi(catch_unwind)]
pub fn create_handler(
    env: &Env,
    uffd: f64,
    options: NativeHandlerOptions,
    notify: Function<'_, (), ()>,
) -> Result<NativeHandler> {
    let failed = |error| Ok(NativeHandler { error: Some(error), handle: 0.0, needs_arming: false });
    let Some(guarded) = UFFDS.get(uffd) else { return failed(failures::closed("userfaultfd")) };
    let pidfd = match options.pidfd.map(copy).transpose() {
        Ok(fd) => fd.map(PidFd::from_fd).transpose(),
        Err(error) => return failed(error),
    };
    let Ok(pidfd) = pidfd else {
        return failed(failures::system("pidfd", &std::io::Error::from_raw_os_error(libc::EBADF)));
    };
    let settings = HandlerOptions {
        thread: thread::current(),
        deadline: Duration::from_secs_f64(options.deadline / 1000.0),
        policy: if options.kill { FailurePolicy::Kill } else { FailurePolicy::Poison },
        on_self_fault: if options.zero_self_faults { SelfFault::Zero } else { SelfFault::Abort },
        pidfd,
        stack: stack::asker(),
    };
    if let Err(error) = settings.check(&guarded) {
        return failed((&error).into());
    }
    let handler = match Handler::attach(guarded, settings) {
        Ok(handler) => handler,
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return failed(failures::handled()),
        Err(error) => return failed(failures::system("eventfd or pthread_create", &error)),
    };
    let polling = match Polling::start(env, &handler, &notify, options.by_thread) {
        Ok(polling) => polling,
        Err(error) => {
            handler.detach();
            return Err(error);
        }
    };
    let needs_arming = polling.needs_arming();
    let handling = Handling { handler, polling: Mutex::new(Some(polling)) };
    let handle = HANDLERS.insert(Arc::new(handling), environment::of(env)?);
    Ok(NativeHandler { error: None, handle, needs_arming })
}

/// The mappings there are: address, length, page size, and again.
#[napi(catch_unwind)]
pub fn set_handler_areas(handle: f64, areas: Vec<f64>) {
    let Some(handling) = HANDLERS.get(handle) else { return };
    let (areas, _) = areas.as_chunks::<3>();
    let area = |&[start, len, page_size]: &[f64; 3]| Area {
        start: start as u64,
        len: len as u64,
        page_size: page_size as u64,
    };
    handling.handler.set_areas(areas.iter().map(area).collect());
}

/// JavaScript has read everything.
#[napi(catch_unwind)]
pub fn arm_handler(handle: f64) {
    let Some(handling) = HANDLERS.get(handle) else { return };
    if let Some(polling) = &*handling.polling() {
        polling.arm();
    }
}

/// Milliseconds until a fault that was put off is due; -1 where there is none.
#[napi(catch_unwind)]
pub fn handler_due(handle: f64) -> f64 {
    let due = HANDLERS.get(handle).and_then(|handling| handling.handler.next_due());
    due.map_or(-1.0, |due| due.as_secs_f64() * 1000.0)
}

/// Faults that are open, as far as they have been read.
#[napi(catch_unwind)]
pub fn handler_open(handle: f64) -> u32 {
    HANDLERS.get(handle).map_or(0, |handling| handling.handler.open() as u32)
}

/// Whether the process whose memory it is has gone.
#[napi(catch_unwind)]
pub fn handler_gone(handle: f64) -> bool {
    HANDLERS.get(handle).is_none_or(|handling| handling.handler.is_gone())
}

/// Ends it: what is missing is poisoned, or left to become zeros. The userfaultfd stays to be closed.
#[napi(catch_unwind)]
pub fn end_handler(handle: f64, poison: bool) -> Option<NativeError> {
    let handling = HANDLERS.get(handle)?;
    if let Err(error) = handling.handler.end(poison, "the handler was closed") {
        return Some(error.into());
    }
    handling.stop();
    forget_last();
    drop(HANDLERS.remove(handle));
    None
}

/// Poisons a fault's page, or kills; whether the fault was still open.
#[napi(catch_unwind)]
pub fn fail_fault(handle: f64, id: f64, why: String, kill: bool) -> bool {
    let policy = if kill { FailurePolicy::Kill } else { FailurePolicy::Poison };
    HANDLERS.get(handle).is_some_and(|handling| handling.handler.fail(id as u64, &why, policy))
}

/// Words of a delivery: what it is, then up to three of its own.
const WORDS: usize = 4;
/// From here on it is no fault to be answered.
const OTHERS: f64 = 64.0;

fn row_of(env: &Env, delivery: Delivery) -> [f64; WORDS] {
    let of_fault =
        |code: f64, fault: OpenFault| [code, fault.id as f64, fault.address as f64, f64::from(fault.flags)];
    match delivery {
        // An environment that ends takes no more children: they are closed.
        Delivery::Event(Event::Fork { child }) => {
            [OTHERS, environment::keep(env, child).unwrap_or(-1.0), 0.0, 0.0]
        }
        Delivery::Event(Event::Remap { from, to, len }) => [OTHERS + 1.0, from as f64, to as f64, len as f64],
        Delivery::Event(Event::Remove { start, end }) => [OTHERS + 2.0, start as f64, end as f64, 0.0],
        Delivery::Event(Event::Unmap { start, end }) => [OTHERS + 3.0, start as f64, end as f64, 0.0],
        Delivery::Event(Event::Unknown { event }) => [OTHERS + 4.0, f64::from(event), 0.0, 0.0],
        // Faults are opened by the queue and come back as faults.
        Delivery::Event(Event::Fault(_)) => [OTHERS + 4.0, 0.0, 0.0, 0.0],
        Delivery::Stale(id) => [OTHERS + 5.0, id as f64, 0.0, 0.0],
        Delivery::Expired(fault) => of_fault(OTHERS + 6.0, fault),
        Delivery::SelfFault(fault) => of_fault(OTHERS + 7.0, fault),
    }
}

/// Reads into rows; how many, or -errno.
pub(crate) fn take(env: &Env, handle: f64, rows: &View) -> f64 {
    with(handle, |handling| delivered(env, handling, rows)).unwrap_or(negative(libc::EBADF))
}

fn delivered(env: &Env, handling: &Handling, rows: &View) -> f64 {
    let most = rows.len / size_of::<f64>() / WORDS;
    let next = Cell::new(rows.data.cast::<f64>());
    let put = |row: [f64; WORDS]| {
        let at = next.replace(next.get().wrapping_add(WORDS));
        // SAFETY: there are at most as many deliveries as the view has rows; TypeScript passes the bytes of a Float64Array, which
        // is aligned for them.
        unsafe { at.cast::<[f64; WORDS]>().write(row) };
    };
    let put_fault = |fault: &OpenFault| {
        // As signed numbers, which they fit: the processor converts those by itself.
        let (id, address) = (fault.id as i64, fault.address as i64);
        put([f64::from(fault.flags), id as f64, address as f64, f64::from(fault.thread)]);
    };
    let delivered = handling.handler.deliver(most, |delivery| put(row_of(env, delivery)), put_fault);
    match delivered {
        Ok(count) => count as f64,
        Err(error) => negative(error.errno().unwrap_or(libc::EIO)),
    }
}

/// How faults are answered without bytes, by number.
fn resolved(uffd: &Userfaultfd, run: Run, how: u32, mode: u32) -> std::result::Result<u64, UffdError> {
    let Run { start, len, page_size, wake, .. } = run;
    match how {
        0 => match uffd.zero(start, len, wake) {
            // Huge pages have no zero page.
            Err(UffdError::System { .. }) if page_size > uffd::page_size() as u64 => {
                uffd.zero_huge(start, len, page_size as usize, wake)
            }
            result => result,
        },
        1 => uffd.continue_pages(start, len, ContinueOptions { wake, write_protect: mode & PROTECT != 0 }),
        2 => uffd.poison(start, len, wake),
        3 => uffd.write_protect(start, len, false, wake),
        _ if wake => uffd.wake(start, len),
        // Which is done for all of them at once.
        _ => Ok(()),
    }
    .map(|()| len)
}

fn number(answered: Answered) -> f64 {
    if let Answered::Done(bytes) = answered {
        return bytes as f64;
    }
    match answered {
        Answered::Done(_) => 0.0,
        Answered::Later => negative(libc::EAGAIN),
        Answered::Stale => negative(libc::ESTALE),
        Answered::Failed(error) => negative(error.errno().unwrap_or(libc::EIO)),
    }
}

/// `len` bytes, which need not be those of the run.
fn copied(
    uffd: &Userfaultfd,
    run: Run,
    source: *const u8,
    len: usize,
    mode: u32,
) -> std::result::Result<u64, UffdError> {
    let options = CopyOptions { wake: run.wake, write_protect: mode & PROTECT != 0 };
    // SAFETY: TypeScript passes a view of `len` bytes, or an address that the kernel checks. The destination is memory of
    // the package's own mappings or of another process: no reference to it exists.
    unsafe { uffd.copy(run.start, source, len, options) }.map(|()| len as u64)
}

fn answered(
    handle: f64,
    id: f64,
    act: impl FnOnce(&Userfaultfd, &OpenFault) -> std::result::Result<u64, UffdError>,
) -> f64 {
    with(handle, |handling| number(handling.handler.answer(id as u64, act))).unwrap_or(negative(libc::ESTALE))
}

/// Fills the page of a fault, and those behind it for as many bytes as there are.
pub(crate) fn answer_copy(handle: f64, id: f64, source: &View, mode: u32) -> f64 {
    let act = |uffd: &Userfaultfd, fault: &OpenFault| {
        copied(uffd, Run::alone(fault), source.data, source.len, mode)
    };
    answered(handle, id, act)
}

pub(crate) fn answer_copy_from(handle: f64, id: f64, source: f64, len: f64, mode: u32) -> f64 {
    let source = source as u64 as *const u8;
    let act =
        |uffd: &Userfaultfd, fault: &OpenFault| copied(uffd, Run::alone(fault), source, len as usize, mode);
    answered(handle, id, act)
}

pub(crate) fn answer(handle: f64, id: f64, how: f64, mode: u32) -> f64 {
    let act = |uffd: &Userfaultfd, fault: &OpenFault| resolved(uffd, Run::alone(fault), how as u32, mode);
    answered(handle, id, act)
}

/// Puts a fault off; whether it was there to be put off.
pub(crate) fn defer(handle: f64, id: f64) -> f64 {
    with(handle, |handling| f64::from(u8::from(handling.handler.defer(id as u64)))).unwrap_or(0.0)
}

/// The rows of a batch, and behind all of them room for what comes of each: bytes, or -errno.
pub(crate) struct Batch<'a> {
    words: &'a View,
    count: usize,
    room: usize,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(words: &'a View, count: f64) -> Self {
        let room = words.len / size_of::<f64>() / (WORDS + 1);
        Self { words, count: room.min(count as usize), room }
    }

    /// Below `(WORDS + 1) * room`.
    fn at(&self, index: usize) -> *mut f64 {
        self.words.data.cast::<f64>().wrapping_add(index)
    }

    fn id(&self, index: usize) -> u64 {
        // SAFETY: the caller's index is below `count`; TypeScript passes the bytes of a Float64Array, which is aligned for it.
        (unsafe { self.at(index * WORDS + 1).read() }) as u64
    }

    fn tell(&self, index: usize, result: f64) {
        // SAFETY: as above.
        unsafe { self.at(self.room * WORDS + index).write(result) };
    }
}

/// Answers a whole batch with bytes: a page each, or one page for all. How many were answered.
pub(crate) fn answer_all_copy(handle: f64, batch: &Batch<'_>, source: &View, mode: u32) -> f64 {
    let is_one_page = |run: Run| source.len as u64 <= run.page_size;
    let joining = if batch.count as u64 > 1 && source.len > uffd::page_size() {
        Joining::InOrder
    } else {
        Joining::Never
    };
    answer_rows(handle, batch, joining, |uffd, run| {
        let from = if is_one_page(run) { 0 } else { run.index * run.page_size as usize };
        let len = run.len as usize;
        if from.saturating_add(len) > source.len {
            return Err(UffdError::invalid(uffd::Operation::Copy));
        }
        copied(uffd, run, source.data.wrapping_add(from), len, mode)
    })
}

/// Answers a whole batch without bytes. How many were answered.
pub(crate) fn answer_all(handle: f64, batch: &Batch<'_>, how: f64, mode: u32) -> f64 {
    answer_rows(handle, batch, Joining::Always, |uffd, run| resolved(uffd, run, how as u32, mode))
}

fn answer_rows(
    handle: f64,
    batch: &Batch<'_>,
    joining: Joining,
    act: impl FnMut(&Userfaultfd, Run) -> std::result::Result<u64, UffdError>,
) -> f64 {
    let mut answered = 0.0;
    let told = |index, result| {
        if matches!(result, Answered::Done(_)) {
            answered += 1.0;
        }
        batch.tell(index, number(result));
    };
    let ids = (0..batch.count).map(|index| batch.id(index));
    match with(handle, |handling| handling.handler.answer_all(ids, joining, act, told)) {
        Some(()) => answered,
        None => negative(libc::ESTALE),
    }
}
