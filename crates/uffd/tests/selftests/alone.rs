//! A test in a process of its own: this program again, running one test.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::FromRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use uffd::liveness::PidFd;

use crate::processes::HugePages;

const ALONE: &str = "UFFD_SELFTEST_ALONE";

/// More than the deadlines inside a test, so that those speak first.
const DEADLINE: Duration = Duration::from_secs(30);

/// Tests of one case, each with its memory: `cases!(case; anon = Memory::Anon, ...)`, or `cases!(case; all)`.
macro_rules! cases {
    ($case:expr; all) => {
        cases!($case; anon = Memory::Anon, shmem = Memory::Shmem, shmem_private = Memory::ShmemPrivate,
            hugetlb = Memory::Hugetlb, hugetlb_private = Memory::HugetlbPrivate);
    };
    ($case:expr; $($name:ident = $memory:expr),+ $(,)?) => {
        $(
            #[test]
            fn $name() {
                let memory: crate::memory::Memory = $memory;
                let title = crate::alone::title(module_path!(), stringify!($name));
                crate::alone::run(&title, memory.pool(), || $case(memory));
            }
        )+
    };
}

/// A single test without a choice of memory.
macro_rules! case {
    ($name:ident, $huge_pages:expr, $case:expr) => {
        #[test]
        fn $name() {
            let title = crate::alone::title(module_path!(), stringify!($name));
            crate::alone::run(&title, $huge_pages, $case);
        }
    };
}

/// What the test harness calls a test: its path without the name of the program.
pub fn title(module: &str, name: &str) -> String {
    let (_, module) = module.split_once("::").unwrap();
    format!("{module}::{name}")
}

/// Runs a test in a process of its own, with so many huge pages to take from the pool. What it says about being skipped is
/// said here.
pub fn run(title: &str, huge_pages: usize, act: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some_and(|name| name == title) {
        end_at_the_first_panic();
        act();
        return;
    }
    // The pool is put back by this process, whatever becomes of the other.
    let pool = (huge_pages > 0).then(|| HugePages::reserve(huge_pages));
    if pool.as_ref().is_some_and(Option::is_none) {
        return;
    }
    let mut output = output_file();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", title, "--nocapture", "--test-threads=1"])
        .env(ALONE, title)
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output.try_clone().unwrap())
        // Its children are in the group, so none outlives a test that failed.
        .process_group(0)
        .spawn()
        .unwrap();
    let ended = PidFd::open(child.id() as i32).unwrap().wait(DEADLINE).unwrap();
    // SAFETY: takes numbers. The group's leader is our child and not reaped, so the number is still its.
    unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
    let status = child.wait().unwrap();
    let mut said = String::new();
    output.rewind().unwrap();
    output.read_to_string(&mut said).unwrap();
    assert!(ended, "still running after {DEADLINE:?}:\n{said}");
    assert!(status.success() && said.contains("1 passed"), "{status}:\n{said}");
    for line in said.lines() {
        if let Some((_, reason)) = line.split_once("skipped: ") {
            println!("skipped: {reason}");
        }
    }
}

/// A thread that waits for a page would wait for ever for a server that has panicked.
fn end_at_the_first_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        tell(info);
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(101) }
    }));
}

/// Not a pipe: that would have to be read while the test runs, and ends only with the last process that has it.
fn output_file() -> File {
    // SAFETY: the name is a C string that lives for ever.
    let fd = unsafe { libc::memfd_create(c"output".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just put this descriptor into our table; nobody else knows of it.
    unsafe { File::from_raw_fd(fd) }
}
