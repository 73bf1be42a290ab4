//! On which CPU a thread runs.

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Has the calling thread, and threads that it starts from then on, run on this CPU only (`sched_setaffinity`).
///
/// # Errors
///
/// EINVAL: there is no such CPU, or this process may not use it.
pub fn pin(cpu: usize) -> Result<(), Errno> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set)
}
