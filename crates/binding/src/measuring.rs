//! What `userfaultfd bench` measures with: the floor, and who touches memory.

use napi::bindgen_prelude::Object;
use napi::{Env, Result};
use napi_derive::napi;
use uffd::floor;

use crate::environment::UFFDS;
use crate::failures;
use crate::jobs::{self, ACCESSES, Outcome, Product, WAITS};
use crate::memory::mapping;
use crate::operations::negative;

/// Has this thread, and those that it starts, run on one CPU only: 0, or -errno.
#[napi(catch_unwind)]
pub fn pin_thread(cpu: u32) -> f64 {
    pager::pin(cpu as usize).map_or_else(|errno| negative(errno as i32), |()| 0.0)
}

/// Touches each page. Words of eight bytes: nanoseconds, sum; then the nanoseconds of each page in four.
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn touch_pages<'env>(env: &'env Env, handle: f64, seed: u32, cpu: u32) -> Result<Object<'env>> {
    let mapping = mapping(handle);
    jobs::run(env, &ACCESSES, move || {
        let touched = pager::touch(&*mapping?, seed, Some(cpu as usize));
        let touched = touched.map_err(|error| failures::system("sched_setaffinity", &error))?;
        let mut bytes = [touched.nanoseconds, touched.sum].map(u64::to_ne_bytes).concat();
        bytes.extend(touched.latencies.iter().flat_map(|each| each.to_ne_bytes()));
        Ok(Product { bytes: Some(bytes), ..Product::default() })
    })
}

/// The floor of answering faults: so many, then it is over.
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn floor_answer<'env>(
    env: &'env Env,
    uffd: f64,
    memory: f64,
    image: f64,
    faults: u32,
    spin: bool,
) -> Result<Object<'env>> {
    let (uffd, memory, image) = (UFFDS.get(uffd), mapping(memory), mapping(image));
    jobs::run(env, &WAITS, move || {
        let uffd = uffd.ok_or_else(|| failures::closed("userfaultfd"))?;
        let how = if spin { floor::Waiting::Spin } else { floor::Waiting::Sleep };
        outcome(floor::answer(&uffd, &*memory?, &*image?, faults as usize, how).map(|()| 0))
    })
}

/// The floor of filling: all of it, so many bytes an ioctl. A word of eight bytes: nanoseconds.
#[napi(catch_unwind, ts_return_type = "Promise<NativeJob>")]
pub fn floor_fill<'env>(
    env: &'env Env,
    uffd: f64,
    memory: f64,
    image: f64,
    piece: u32,
) -> Result<Object<'env>> {
    let (uffd, memory, image) = (UFFDS.get(uffd), mapping(memory), mapping(image));
    jobs::run(env, &WAITS, move || {
        let uffd = uffd.ok_or_else(|| failures::closed("userfaultfd"))?;
        outcome(floor::fill(&uffd, &*memory?, &*image?, u64::from(piece)).map(|time| time.as_nanos() as u64))
    })
}

fn outcome(result: std::io::Result<u64>) -> Outcome {
    let nanoseconds = result.map_err(|error| failures::system("UFFDIO_COPY", &error))?;
    Ok(Product { bytes: Some(nanoseconds.to_ne_bytes().to_vec()), ..Product::default() })
}
