//! What a run of zero pages inside a window of data costs: copied with the rest, or installed by an ioctl of its own.
//!
//! `cargo run --release -p uffd --example zero_runs`
#![allow(clippy::unwrap_used, reason = "a measurement that cannot be made ends")]

use std::time::{Duration, Instant};

use uffd::{CopyOptions, CreateOptions, Factory, Mapping, MappingKind, Modes, Userfaultfd};

const PAGE: usize = 4096;
/// Pages of a window.
const WINDOW: usize = 16;
const WINDOWS: usize = 1024;
const ROUNDS: usize = 15;

fn copy(uffd: &Userfaultfd, mapping: &Mapping, page: usize, bytes: &[u8]) {
    let to = mapping.address() + (page * PAGE) as u64;
    // SAFETY: the bytes are this program's and nobody writes them; no reference to the mapping exists.
    unsafe { uffd.copy(to, bytes.as_ptr(), bytes.len(), CopyOptions::default()) }.unwrap();
}

/// Fills every window, `zeros` pages in the middle of each by the kernel's zeros; microseconds a window.
fn fill(uffd: &Userfaultfd, mapping: &Mapping, bytes: &[u8], zeros: usize) -> f64 {
    let before = (WINDOW - zeros) / 2;
    let behind = before + zeros;
    let started = Instant::now();
    for window in 0..WINDOWS {
        let page = window * WINDOW;
        if zeros == 0 {
            copy(uffd, mapping, page, bytes);
            continue;
        }
        if before > 0 {
            copy(uffd, mapping, page, &bytes[..before * PAGE]);
        }
        uffd.zero(mapping.address() + ((page + before) * PAGE) as u64, (zeros * PAGE) as u64, true).unwrap();
        if behind < WINDOW {
            copy(uffd, mapping, page + behind, &bytes[behind * PAGE..]);
        }
    }
    micros(started.elapsed()) / WINDOWS as f64
}

/// Writes a byte to every page; microseconds a page.
fn write(mapping: &Mapping) -> f64 {
    let started = Instant::now();
    for page in 0..WINDOWS * WINDOW {
        mapping.write(page * PAGE, &[1]).unwrap();
    }
    micros(started.elapsed()) / (WINDOWS * WINDOW) as f64
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    for (name, kind) in [("private", MappingKind::Private), ("shared", MappingKind::Shared)] {
        let mapping = Mapping::new(WINDOWS * WINDOW * PAGE, kind).unwrap();
        let uffd = Factory::open().create(&CreateOptions::default()).unwrap();
        // SAFETY: no reference to the mapping exists.
        unsafe { uffd.register(mapping.address(), mapping.len() as u64, Modes::MISSING) }.unwrap();
        let bytes = vec![7; WINDOW * PAGE];
        for zeros in [0, 1, 2, 3, 4, 6, 8, 12, 16] {
            let times = (0..ROUNDS).map(|_| {
                let time = fill(&uffd, &mapping, &bytes, zeros);
                mapping.discard(0, mapping.len()).unwrap();
                time
            });
            println!("{name}: {zeros:2} of {WINDOW} pages zero: {:.2} us a window", median(times.collect()));
        }
        for zeros in [0, WINDOW] {
            let times = (0..ROUNDS).map(|_| {
                fill(&uffd, &mapping, &bytes, zeros);
                let time = write(&mapping);
                mapping.discard(0, mapping.len()).unwrap();
                time
            });
            let what = if zeros == 0 { "copied" } else { "zero" };
            println!("{name}: the first write to a {what} page: {:.2} us", median(times.collect()));
        }
    }
}
