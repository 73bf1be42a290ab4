//! The limit behind a system call that failed for want of something.

use nix::errno::Errno;

/// Which limit was reached, and where it is set, where a system call or ioctl says that there is no more of something.
#[must_use]
pub fn limit_behind(call: &str, errno: i32) -> Option<&'static str> {
    Some(match Errno::from_raw(errno) {
        Errno::EMFILE => {
            "No descriptor of this process is free: raise RLIMIT_NOFILE (`ulimit -n`, `LimitNOFILE=`)."
        }
        Errno::ENFILE => "No descriptor of this machine is free: raise fs.file-max.",
        Errno::EAGAIN if matches!(call, "clone" | "pthread_create") => {
            "No thread can be started: raise RLIMIT_NPROC (`ulimit -u`, `LimitNPROC=`), pids.max of the cgroup (`TasksMax=`) or \
             kernel.threads-max."
        }
        Errno::ENOMEM
            if matches!(call, "UFFDIO_COPY" | "UFFDIO_ZEROPAGE" | "UFFDIO_CONTINUE" | "UFFDIO_POISON") =>
        {
            "There is no memory for the page: raise memory.max of the cgroup that the process is in (memory.limit_in_bytes in \
             version 1), or the size of the tmpfs that it maps; or the machine has none."
        }
        Errno::ENOMEM => {
            "The process has as many mappings as it may have (vm.max_map_count; registering a part of one cuts it), or there is no \
             memory."
        }
        _ => return None,
    })
}
