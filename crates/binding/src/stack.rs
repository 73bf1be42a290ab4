//! The stack of a JavaScript thread that has stopped in a fault of its own: written by that thread itself, which is the only one
//! that can, as soon as it runs again. By functions of the engine that the runtime exports; without them there is none.

use std::ffi::{c_char, c_int, c_void};
use std::ptr;

use napi::sys;

use crate::polling::{function, symbol};

type Isolate = *mut c_void;
type Interrupt = unsafe extern "C" fn(Isolate, *mut c_void);

type Request = unsafe extern "C" fn(Isolate, Interrupt, *mut c_void);
type Current = unsafe extern "C" fn() -> Isolate;
type Print = unsafe extern "C" fn(Isolate, c_int);

struct Asker {
    isolate: Isolate,
    request: Request,
}

// SAFETY: the engine's request for an interrupt is meant for other threads.
unsafe impl Send for Asker {}
// SAFETY: as above.
unsafe impl Sync for Asker {}

impl Asker {
    fn of_this_thread() -> Option<Self> {
        let current = function!(c"_ZN2v87Isolate10GetCurrentEv", Current);
        let request = function!(c"_ZN2v87Isolate16RequestInterruptEPFvPS0_PvES2_", Request);
        // SAFETY: called from JavaScript, so this thread has one.
        let isolate = unsafe { current() };
        (!isolate.is_null()).then_some(Self { isolate, request })
    }
}

/// What asks this thread for its stack, later and from another thread; the program ends there.
pub(crate) fn asker() -> Option<Box<dyn Fn() -> bool + Send + Sync>> {
    let asker = Asker::of_this_thread()?;
    Some(Box::new(move || {
        let asker = &asker;
        // SAFETY: the isolate lives: its thread sleeps in the fault that this is about.
        unsafe { (asker.request)(asker.isolate, last_words, ptr::null_mut()) };
        true
    }))
}

unsafe extern "C" fn last_words(isolate: Isolate, _: *mut c_void) {
    print(isolate);
    let (place, text) = (c"userfaultfd", c"a thread would have waited for itself; its stack is above");
    let len = |text: &std::ffi::CStr| text.count_bytes() as isize;
    // SAFETY: two texts of these lengths. It does not return; with --report-on-fatalerror Node writes its diagnostic report.
    unsafe {
        sys::napi_fatal_error(place.as_ptr().cast::<c_char>(), len(place), text.as_ptr().cast(), len(text));
    }
}

fn print(isolate: Isolate) {
    let find = || -> Option<Print> {
        Some(function!(c"_ZN4node22PrintCurrentStackTraceEPN2v87IsolateENS_16StackTracePrefixE", Print))
    };
    if let Some(print) = find() {
        // SAFETY: on the isolate's own thread; 0 is the prefix `at`.
        unsafe { print(isolate, 0) };
    }
}
