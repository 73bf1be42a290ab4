//! The calls of the inner loop, by Node-API itself: what napi-rs does for each argument costs as much as the rest of the call
//! (measured, docs/DESIGN.md). Numbers in, a number out; `src/native.ts` has their types.

use std::panic::{AssertUnwindSafe, catch_unwind};

use napi::bindgen_prelude::{FromNapiValue, JsObjectValue, Object};
use napi::{Callback, Env, Result, sys};
use napi_derive::napi;

use crate::handlers;
use crate::operations as on;
use crate::scanning;
use crate::views::View;

/// The arguments of a call, one after the other. What is missing or of another type makes the call refuse.
struct Arguments<const N: usize> {
    env: sys::napi_env,
    values: [sys::napi_value; N],
}

impl<const N: usize> Arguments<N> {
    /// # Safety
    ///
    /// Both are those of the call in progress.
    unsafe fn of(env: sys::napi_env, info: sys::napi_callback_info) -> Self {
        let mut values = [std::ptr::null_mut(); N];
        let mut count = N;
        // SAFETY: there is room for `count` arguments; those that were not given become `undefined`.
        unsafe {
            sys::napi_get_cb_info(
                env,
                info,
                &raw mut count,
                values.as_mut_ptr(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            )
        };
        Self { env, values }
    }

    fn number(&self, index: usize) -> Option<f64> {
        let mut number = 0.0;
        // SAFETY: an argument of the call in progress; the output lives across the call.
        let status =
            unsafe { sys::napi_get_value_double(self.env, *self.values.get(index)?, &raw mut number) };
        (status == sys::Status::napi_ok).then_some(number)
    }

    fn view(&self, index: usize) -> Option<View> {
        // SAFETY: an argument of the call in progress.
        unsafe { View::from_napi_value(self.env, *self.values.get(index)?) }.ok()
    }

    /// What is returned: nothing that could be thrown or could unwind into the engine.
    fn answer(&self, act: impl FnOnce(&Self) -> Option<f64>) -> sys::napi_value {
        let result = catch_unwind(AssertUnwindSafe(|| act(self)));
        let number = match result {
            Ok(Some(number)) => number,
            Ok(None) => on::negative(libc::EINVAL),
            Err(_) => on::negative(libc::EIO),
        };
        let mut value = std::ptr::null_mut();
        // SAFETY: the environment of the call in progress; the output lives across the call.
        unsafe { sys::napi_create_double(self.env, number, &raw mut value) };
        value
    }
}

/// Defines a callback: its name, how many arguments it has, and what it does with them.
macro_rules! call {
    ($name:ident, $count:literal, |$given:ident| $act:expr) => {
        unsafe extern "C" fn $name(env: sys::napi_env, info: sys::napi_callback_info) -> sys::napi_value {
            // SAFETY: the engine calls this with the environment and the arguments of the call.
            unsafe { Arguments::<$count>::of(env, info) }.answer(|$given| Some($act))
        }
    };
}

call!(copy, 4, |given| on::copy(
    given.number(0)?,
    given.number(1)?,
    &given.view(2)?,
    given.number(3)? as u32
));
call!(copy_part, 5, |given| on::copy_part(
    given.number(0)?,
    given.number(1)?,
    &given.view(2)?,
    given.number(3)?,
    given.number(4)? as u32
));
call!(copy_from, 5, |given| on::copy_from(
    given.number(0)?,
    given.number(1)?,
    given.number(2)?,
    given.number(3)?,
    given.number(4)? as u32
));
call!(move_pages, 5, |given| on::move_pages(
    given.number(0)?,
    given.number(1)?,
    given.number(2)?,
    given.number(3)?,
    given.number(4)? as u32
));
call!(zero, 4, |given| ranged(given, on::zero)?);
call!(zero_huge, 4, |given| ranged(given, on::zero_huge)?);
call!(poison, 4, |given| ranged(given, on::poison)?);
call!(continue_pages, 4, |given| ranged(given, on::continue_pages)?);
call!(write_protect, 4, |given| ranged(given, on::write_protect)?);
call!(wake, 3, |given| on::wake(given.number(0)?, given.number(1)?, given.number(2)?));

call!(scan_written, 5, |given| scanning::scan_written_into(
    given.number(0)?,
    given.number(1)?,
    given.number(2)?,
    given.number(3)? != 0.0,
    &given.view(4)?
));

call!(handler_take, 2, |given| handlers::take(&Env::from_raw(given.env), given.number(0)?, &given.view(1)?));
call!(answer_copy, 4, |given| handlers::answer_copy(
    given.number(0)?,
    given.number(1)?,
    &given.view(2)?,
    given.number(3)? as u32
));
call!(answer_copy_from, 5, |given| handlers::answer_copy_from(
    given.number(0)?,
    given.number(1)?,
    given.number(2)?,
    given.number(3)?,
    given.number(4)? as u32
));
call!(answer, 4, |given| ranged(given, handlers::answer)?);
call!(defer, 2, |given| handlers::defer(given.number(0)?, given.number(1)?));
call!(answer_all_copy, 5, |given| handlers::answer_all_copy(
    given.number(0)?,
    &handlers::Batch::new(&given.view(1)?, given.number(2)?),
    &given.view(3)?,
    given.number(4)? as u32
));
call!(answer_all, 5, |given| handlers::answer_all(
    given.number(0)?,
    &handlers::Batch::new(&given.view(1)?, given.number(2)?),
    given.number(3)?,
    given.number(4)? as u32
));
call!(take_events, 3, |given| on::take_events(
    &Env::from_raw(given.env),
    given.number(0)?,
    &given.view(1)?,
    given.number(2)?
));

/// Of operations that take a range and a mode.
fn ranged(given: &Arguments<4>, act: fn(f64, f64, f64, u32) -> f64) -> Option<f64> {
    Some(act(given.number(0)?, given.number(1)?, given.number(2)?, given.number(3)? as u32))
}

#[napi(module_exports)]
pub fn export_calls(mut exports: Object<'_>) -> Result<()> {
    let calls: [(&str, Callback); 19] = [
        ("uffdCopy", copy),
        ("uffdCopyPart", copy_part),
        ("uffdCopyFrom", copy_from),
        ("uffdMove", move_pages),
        ("uffdZero", zero),
        ("uffdZeroHuge", zero_huge),
        ("uffdPoison", poison),
        ("uffdContinue", continue_pages),
        ("uffdWriteProtect", write_protect),
        ("uffdWake", wake),
        ("uffdTakeEvents", take_events),
        ("scanWrittenInto", scan_written),
        ("handlerTake", handler_take),
        ("answerCopy", answer_copy),
        ("answerCopyFrom", answer_copy_from),
        ("answerFault", answer),
        ("deferFault", defer),
        ("answerAllCopy", answer_all_copy),
        ("answerAll", answer_all),
    ];
    for (name, call) in calls {
        exports.create_named_method(name, call)?;
    }
    Ok(())
}
