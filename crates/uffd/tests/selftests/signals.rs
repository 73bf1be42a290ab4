//! SIGBUS and SIGSEGV of accesses, answered in place: by filling or unprotecting the page, as a program without a server
//! thread does, or by putting other memory there, so that the access goes on and can be counted.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use uffd::{CopyOptions, Userfaultfd};

use crate::memory::Area;

/// More pages than any area here has.
const MOST: usize = 1024;

static PLAN: OnceLock<Plan> = OnceLock::new();
static FILL: AtomicBool = AtomicBool::new(false);
static HITS: [AtomicU32; MOST] = [const { AtomicU32::new(0) }; MOST];

struct Plan {
    area: Area,
    /// Who fills, with what.
    filler: Option<(&'static Userfaultfd, Vec<u8>, CopyOptions)>,
}

/// From now on a signal for a page of the area puts other memory there: zeros that anybody may write.
pub fn replace_pages(area: Area) {
    install(Plan { area, filler: None });
}

/// From now on the first SIGBUS of a page copies it in, and the second (if it was copied in protected) unprotects it, until
/// [`stop_filling`].
pub fn fill_pages(area: Area, uffd: &'static Userfaultfd, source: Vec<u8>, options: CopyOptions) {
    install(Plan { area, filler: Some((uffd, source, options)) });
    FILL.store(true, SeqCst);
}

/// Signals are counted from 0 again, and other memory comes where the pages are.
pub fn stop_filling() {
    FILL.store(false, SeqCst);
    HITS.iter().for_each(|hits| hits.store(0, SeqCst));
}

/// How many signals came for a page.
pub fn hits(page: usize) -> u32 {
    HITS[page].load(SeqCst)
}

fn install(plan: Plan) {
    assert!(plan.area.count <= MOST);
    assert!(PLAN.set(plan).is_ok(), "one plan for a process");
    let action = SigAction::new(SigHandler::SigAction(on_signal), SaFlags::SA_SIGINFO, SigSet::empty());
    for signal in [Signal::SIGBUS, Signal::SIGSEGV] {
        // SAFETY: `on_signal` makes async-signal-safe calls only and touches statics that are initialised.
        unsafe { sigaction(signal, &action) }.unwrap();
    }
}

extern "C" fn on_signal(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo that lives as long as the handler runs.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS and SIGSEGV of an access carry its address.
    let address = unsafe { info.si_addr() } as u64;
    let Some(plan) = PLAN.get() else { give_up(110) };
    let (start, page) = (plan.area.start(), plan.area.page());
    if !(start..start + plan.area.len()).contains(&address) {
        give_up(111);
    }
    let index = (address - start) as usize / page;
    let before = HITS[index].fetch_add(1, SeqCst);
    if before > 2 {
        // Answering did not help.
        give_up(112);
    }
    match &plan.filler {
        Some((uffd, source, options)) if FILL.load(SeqCst) => {
            let at = plan.area.at(index);
            let done = if before == 0 {
                let from = source.as_ptr().wrapping_add(index * page);
                // SAFETY: `source` has a page for each of the area and never changes; no reference to the area exists.
                unsafe { uffd.copy(at, from, page, *options) }
            } else {
                uffd.write_protect(at, page as u64, false, true)
            };
            if done.is_err() {
                give_up(113);
            }
        }
        _ => replace(plan.area.at(index), page),
    }
}

fn replace(address: u64, len: usize) {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: a page of the area, to which nothing refers; whoever touches it does so through raw pointers.
    let mapped = unsafe { libc::mmap(address as *mut libc::c_void, len, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        give_up(114);
    }
}

fn give_up(code: i32) -> ! {
    // SAFETY: ends the process at once; the code says where.
    unsafe { libc::_exit(code) }
}
