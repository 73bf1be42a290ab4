//! Calling JavaScript when a descriptor becomes readable: by libuv's own polling, whose functions the runtime exports, or,
//! where it does not, by a thread that only notifies.

use std::ffi::{CStr, c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::ptr;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use napi::bindgen_prelude::{Function, JsValue};
use napi::threadsafe_function::ThreadsafeFunctionCallMode;
use napi::{Env, Result, sys};
use pager::{Handler, WakeUp};

use crate::notices::{Wake, wake_by};

const UV_POLL: c_int = 8;
const UV_READABLE: c_int = 1;

type PollCallback = unsafe extern "C" fn(*mut c_void, c_int, c_int);
type CloseCallback = unsafe extern "C" fn(*mut c_void);

type HandleSize = unsafe extern "C" fn(c_int) -> usize;
type PollInit = unsafe extern "C" fn(*mut c_void, *mut c_void, c_int) -> c_int;
type PollStart = unsafe extern "C" fn(*mut c_void, c_int, PollCallback) -> c_int;
type SetData = unsafe extern "C" fn(*mut c_void, *mut c_void);
type GetData = unsafe extern "C" fn(*const c_void) -> *mut c_void;
type Close = unsafe extern "C" fn(*mut c_void, Option<CloseCallback>);
type Unref = unsafe extern "C" fn(*mut c_void);

/// The functions of libuv that are used.
struct Uv {
    handle_size: HandleSize,
    poll_init: PollInit,
    poll_start: PollStart,
    set_data: SetData,
    get_data: GetData,
    close: Close,
    unref: Unref,
}

/// A symbol of the runtime.
pub(crate) fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name ends with a zero; the default handle asks what is loaded already.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// `function!(c"name", type)`: a function of the runtime as that type.
macro_rules! function {
    ($name:literal, $type:ty) => {{
        let found = symbol($name)?;
        // SAFETY: functions of these names have had these types in every version with this ABI.
        unsafe { std::mem::transmute::<*mut c_void, $type>(found) }
    }};
}
pub(crate) use function;

impl Uv {
    fn get() -> Option<&'static Self> {
        static FOUND: OnceLock<Option<Uv>> = OnceLock::new();
        FOUND.get_or_init(Self::find).as_ref()
    }

    fn find() -> Option<Self> {
        Some(Self {
            handle_size: function!(c"uv_handle_size", HandleSize),
            poll_init: function!(c"uv_poll_init", PollInit),
            poll_start: function!(c"uv_poll_start", PollStart),
            set_data: function!(c"uv_handle_set_data", SetData),
            get_data: function!(c"uv_handle_get_data", GetData),
            close: function!(c"uv_close", Close),
            unref: function!(c"uv_unref", Unref),
        })
    }
}

/// What is called.
struct Callback {
    env: sys::napi_env,
    context: sys::napi_async_context,
    function: sys::napi_ref,
}

impl Callback {
    fn new(env: &Env, function: &Function<'_, (), ()>) -> Result<Self> {
        let env = env.raw();
        let (mut name, mut context, mut reference) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
        let text = c"UffdFaultHandler";
        // SAFETY: the environment of the call in progress; the name ends with a zero and the output lives across the call.
        napi::check_status!(unsafe {
            sys::napi_create_string_utf8(env, text.as_ptr(), text.count_bytes() as isize, &raw mut name)
        })?;
        // SAFETY: as above; no resource of its own.
        napi::check_status!(unsafe { sys::napi_async_init(env, ptr::null_mut(), name, &raw mut context) })?;
        // SAFETY: a value of the call in progress.
        napi::check_status!(unsafe {
            sys::napi_create_reference(env, function.raw(), 1, &raw mut reference)
        })?;
        Ok(Self { env, context, function: reference })
    }

    fn call(&self) {
        let env = self.env;
        let mut scope = ptr::null_mut();
        // SAFETY: called by the event loop of the environment, on its thread, while it lives.
        if unsafe { sys::napi_open_handle_scope(env, &raw mut scope) } != sys::Status::napi_ok {
            return;
        }
        self.call_in_scope();
        // SAFETY: opened above.
        unsafe { sys::napi_close_handle_scope(env, scope) };
    }

    fn call_in_scope(&self) {
        let env = self.env;
        let (mut function, mut receiver, mut result) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
        // SAFETY: the reference lives as long as this.
        unsafe { sys::napi_get_reference_value(env, self.function, &raw mut function) };
        // SAFETY: the environment lives, and the output across the call.
        unsafe { sys::napi_get_global(env, &raw mut receiver) };
        // SAFETY: values of this scope; there are no arguments.
        let status = unsafe {
            sys::napi_make_callback(env, self.context, receiver, function, 0, ptr::null(), &raw mut result)
        };
        if status == sys::Status::napi_pending_exception {
            let mut exception = ptr::null_mut();
            // SAFETY: the environment lives, and the output across the call.
            unsafe { sys::napi_get_and_clear_last_exception(env, &raw mut exception) };
            // SAFETY: what was thrown is told like any uncaught error.
            unsafe { sys::napi_fatal_exception(env, exception) };
        }
    }

    /// Before the environment ends.
    fn delete(&self) {
        // SAFETY: made by this environment, which lives, and not used any more.
        unsafe { sys::napi_delete_reference(self.env, self.function) };
        // SAFETY: as above.
        unsafe { sys::napi_async_destroy(self.env, self.context) };
    }
}

/// One `uv_poll_t`. It is freed by libuv's last call, after it was closed.
struct Poll {
    memory: Box<[u128]>,
    /// Of the descriptor that is rung, itself.
    wake: Option<Arc<WakeUp>>,
    callback: Rc<Callback>,
}

unsafe extern "C" fn readable(handle: *mut c_void, _status: c_int, _events: c_int) {
    let Some(uv) = Uv::get() else { return };
    // SAFETY: a handle that was started below.
    let data = unsafe { (uv.get_data)(handle) };
    // SAFETY: the data is a `Poll`, which lives until the handle has been closed; this only reads it, on its own thread.
    let poll = unsafe { &*data.cast::<Poll>() };
    // Cleared beforehand: what comes while JavaScript looks rings again.
    if let Some(wake) = &poll.wake {
        wake.clear();
    }
    let callback = Rc::clone(&poll.callback);
    callback.call();
}

unsafe extern "C" fn closed(handle: *mut c_void) {
    let Some(uv) = Uv::get() else { return };
    // SAFETY: a handle that was started below.
    let data = unsafe { (uv.get_data)(handle) };
    // SAFETY: the data is a `Poll` made by `Box::into_raw`, and libuv is done with it.
    drop(unsafe { Box::from_raw(data.cast::<Poll>()) });
}

/// Two descriptors that libuv watches.
struct Watched {
    polls: Vec<*mut Poll>,
    callback: Rc<Callback>,
}

impl Watched {
    fn new(
        env: &Env,
        uv: &'static Uv,
        handler: &Arc<Handler>,
        notify: &Function<'_, (), ()>,
    ) -> Result<Self> {
        let mut event_loop = ptr::null_mut();
        // SAFETY: the environment of the call in progress; the output lives across the call.
        napi::check_status!(unsafe { sys::napi_get_uv_event_loop(env.raw(), &raw mut event_loop) })?;
        let callback = Rc::new(Callback::new(env, notify)?);
        let mut watched = Self { polls: Vec::new(), callback };
        let wake = handler.wake();
        let watch =
            [((***handler).as_fd().as_raw_fd(), None), (wake.as_fd().as_raw_fd(), Some(Arc::clone(wake)))];
        for (fd, wake) in watch {
            if let Err(error) = watched.start(uv, event_loop.cast(), wake, fd) {
                watched.stop();
                return Err(error);
            }
        }
        Ok(watched)
    }

    fn start(
        &mut self,
        uv: &'static Uv,
        event_loop: *mut c_void,
        wake: Option<Arc<WakeUp>>,
        fd: RawFd,
    ) -> Result<()> {
        // SAFETY: takes a number and gives one.
        let size = unsafe { (uv.handle_size)(UV_POLL) };
        let poll = Box::into_raw(Box::new(Poll {
            memory: vec![0_u128; size.div_ceil(size_of::<u128>())].into_boxed_slice(),
            wake,
            callback: Rc::clone(&self.callback),
        }));
        // SAFETY: just made, and not shared yet.
        let handle = unsafe { (*poll).memory.as_mut_ptr() }.cast::<c_void>();
        // SAFETY: memory of the size that libuv asks for, which stays where it is until it has been closed.
        let status = unsafe { (uv.poll_init)(event_loop, handle, fd) };
        if status != 0 {
            // SAFETY: libuv has not taken it.
            drop(unsafe { Box::from_raw(poll) });
            return Err(napi::Error::from_reason(format!("uv_poll_init: {status}")));
        }
        self.polls.push(poll);
        // SAFETY: initialised above.
        unsafe { (uv.set_data)(handle, poll.cast()) };
        // SAFETY: as above. It never keeps the program alive: TypeScript does.
        unsafe { (uv.unref)(handle) };
        // SAFETY: as above.
        let status = unsafe { (uv.poll_start)(handle, UV_READABLE, readable) };
        if status == 0 { Ok(()) } else { Err(napi::Error::from_reason(format!("uv_poll_start: {status}"))) }
    }

    fn stop(&mut self) {
        let Some(uv) = Uv::get() else { return };
        for poll in self.polls.drain(..) {
            // SAFETY: it lives until libuv's last call, which comes after this.
            let handle = unsafe { (*poll).memory.as_mut_ptr() }.cast::<c_void>();
            // SAFETY: initialised, and closed only here.
            unsafe { (uv.close)(handle, Some(closed)) };
        }
        self.callback.delete();
    }
}

/// A thread that notifies, and then waits until it is told to go on.
struct Notifier {
    shared: Arc<Notifying>,
    thread: Option<JoinHandle<()>>,
}

struct Notifying {
    handler: Arc<Handler>,
    stopped: AtomicBool,
    /// JavaScript has read everything since it was called.
    armed: Mutex<bool>,
    changed: Condvar,
}

impl Notifying {
    fn run(&self, wake: &Wake) {
        loop {
            self.wait_readable();
            *self.armed.lock().unwrap_or_else(PoisonError::into_inner) = false;
            if self.stopped.load(Ordering::SeqCst) {
                return;
            }
            wake.call((), ThreadsafeFunctionCallMode::NonBlocking);
            let armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = |armed: &mut bool| !*armed && !self.stopped.load(Ordering::SeqCst);
            drop(self.changed.wait_while(armed, ended).unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn wait_readable(&self) {
        let wanted =
            |fd: BorrowedFd<'_>| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut fds = [wanted((**self.handler).as_fd()), wanted(self.handler.wake().as_fd())];
        // SAFETY: two structures, which live across the call.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        self.handler.wake().clear();
    }

    fn arm(&self, stop: bool) {
        if stop {
            self.stopped.store(true, Ordering::SeqCst);
            self.handler.wake().ring();
        }
        *self.armed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

impl Notifier {
    fn new(handler: &Arc<Handler>, wake: Wake) -> Result<Self> {
        let shared = Arc::new(Notifying {
            handler: Arc::clone(handler),
            stopped: AtomicBool::new(false),
            armed: Mutex::new(false),
            changed: Condvar::new(),
        });
        let running = Arc::clone(&shared);
        let thread =
            std::thread::Builder::new().name("uffd-notifier".into()).spawn(move || running.run(&wake))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    fn stop(&mut self) {
        self.shared.arm(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Way {
    Loop(Watched),
    Thread(Notifier),
}

/// How JavaScript is called.
pub(crate) struct Polling(Option<Way>);

// SAFETY: it is made, used and stopped on the thread of its environment only; what JavaScript holds is a number that no
// other thread is given, and the environment's end runs on its thread. Elsewhere it is only moved about.
unsafe impl Send for Polling {}

impl Polling {
    /// Calls `notify` when there is something to read or to deliver: until it was read, by the event loop; once, until it is
    /// armed again, by a thread.
    pub(crate) fn start(
        env: &Env,
        handler: &Arc<Handler>,
        notify: &Function<'_, (), ()>,
        thread: bool,
    ) -> Result<Self> {
        let way = match Uv::get().filter(|_| !thread) {
            Some(uv) => Way::Loop(Watched::new(env, uv, handler, notify)?),
            None => Way::Thread(Notifier::new(handler, wake_by(notify)?)?),
        };
        Ok(Self(Some(way)))
    }

    /// JavaScript has read everything.
    pub(crate) fn arm(&self) {
        if let Some(Way::Thread(notifier)) = &self.0 {
            notifier.shared.arm(false);
        }
    }

    /// Whether JavaScript is to say that it has read everything.
    pub(crate) fn needs_arming(&self) -> bool {
        matches!(self.0, Some(Way::Thread(_)))
    }

    /// Nothing is called any more.
    pub(crate) fn stop(&mut self) {
        match self.0.take() {
            Some(Way::Loop(mut watched)) => watched.stop(),
            Some(Way::Thread(mut notifier)) => notifier.stop(),
            None => {}
        }
    }
}
