//! What this process asks for itself: to die of bad memory the ordinary way, and to run on one CPU.

use crate::failure::Failure;

/// Takes back the handlers that Rust's runtime installs for SIGSEGV and SIGBUS, so that poisoned memory kills
/// at the first access, with the signal itself, as it would kill any other program.
///
/// # Errors
/// signal(2)'s.
pub(crate) fn die_of_fault_signals() -> Result<(), Failure> {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: SIG_DFL runs no code of ours. The runtime's handlers only explain a stack overflow.
        if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(Failure::errno(format!("signal({signal}, SIG_DFL)")));
        }
    }
    Ok(())
}

/// Runs this thread, and those it starts from now on, on `cpu` only.
///
/// # Errors
/// `EINVAL` for a CPU that does not exist or may not be used.
pub(crate) fn pin(cpu: usize) -> Result<(), Failure> {
    const BITS: usize = u64::BITS as usize;
    // The kernel takes masks of any length; libc's cpu_set_t ends at 1024 CPUs.
    let mut mask = vec![0u64; cpu / BITS + 1];
    if let Some(word) = mask.last_mut() {
        *word = 1 << (cpu % BITS);
    }
    let len = size_of_val(mask.as_slice());
    // SAFETY: the kernel reads `len` bytes of `mask`, which lives across the call.
    let result = unsafe { libc::sched_setaffinity(0, len, mask.as_ptr().cast()) };
    if result == 0 { Ok(()) } else { Err(Failure::errno(format!("sched_setaffinity(CPU {cpu})"))) }
}
