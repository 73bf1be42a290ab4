//! Faults of the very thread that would have to answer them.

use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::time::Duration;

use uffd::{ContinueOptions, CopyOptions, UffdError, Userfaultfd, page_size};

use crate::handler_queue::{Area, OpenFault};
use crate::last_words::say;

/// A thread that has taken no turn for so long, and sleeps in a fault, is taken for one that waits for itself.
const STUCK: Duration = Duration::from_millis(500);
/// How long the thread has to write its stack.
const LAST_WORDS: Duration = Duration::from_millis(500);
static ZEROS: [u8; 4096] = [0; 4096];

/// What becomes of such a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SelfFault {
    /// The program ends with an explanation.
    #[default]
    Abort,
    /// The page is filled with zeros.
    Zero,
}

/// What speaks for it so far.
#[derive(Debug, Default)]
pub(crate) struct Suspect {
    /// The page of the thread's last fault, whose waiters were woken to look again.
    page: Option<u64>,
    turns: u64,
}

impl Suspect {
    /// Whether the thread has come back to the page it was woken for. (Else somebody has filled it meanwhile.)
    pub(crate) fn is_again(&mut self, fault: &OpenFault) -> bool {
        let again = self.page == Some(fault.page);
        self.page = if again { None } else { Some(fault.page) };
        again
    }

    /// Whether the thread has done nothing since a fault came, long ago, and sleeps in one.
    pub(crate) fn is_stuck(&mut self, turns: u64, age: Duration, thread: u32) -> bool {
        let idle = self.turns == turns;
        self.turns = turns;
        idle && age >= STUCK && sleeps_in_fault(thread)
    }
}

/// A small file of /proc, without an allocation.
fn read_proc(thread: u32, name: &str, bytes: &mut [u8; 64]) -> usize {
    let mut path = [0_u8; 64];
    let mut rest = &mut path[..];
    // The buffer is zeroed, so what is written ends with a zero.
    if std::io::Write::write_fmt(&mut rest, format_args!("/proc/self/task/{thread}/{name}")).is_err() {
        return 0;
    }
    // SAFETY: a path that ends with a zero and lives across the call.
    let fd = unsafe { libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if fd < 0 {
        return 0;
    }
    // SAFETY: just opened, and nobody else's.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.read(bytes).unwrap_or(0)
}

/// Whether it sleeps in a fault of a userfaultfd, by the name of the kernel function it sleeps in.
pub(crate) fn sleeps_in_fault(thread: u32) -> bool {
    let mut bytes = [0; 64];
    let len = read_proc(thread, "wchan", &mut bytes);
    bytes.get(..len) == Some(b"handle_userfault")
}

/// Whether it faulted by itself, and not inside a system call.
fn is_in_user_mode(thread: u32) -> bool {
    let mut bytes = [0; 64];
    let len = read_proc(thread, "syscall", &mut bytes);
    bytes.get(..len).is_some_and(|text| text.starts_with(b"-1 "))
}

/// Lets whoever waits go on with zeros, or with what is there.
pub(crate) fn give_zeros(uffd: &Userfaultfd, fault: &OpenFault) {
    let (page, size) = (fault.page, fault.page_size);
    let given = match fault.flags & 3 {
        1 => uffd.write_protect(page, size, false, true),
        2 => uffd.continue_pages(page, size, ContinueOptions { wake: true, write_protect: false }),
        _ if size == page_size() as u64 && size as usize == ZEROS.len() => {
            let options = CopyOptions { wake: true, write_protect: false };
            // SAFETY: the source is so long; the destination is missing, so no reference to it exists.
            unsafe { uffd.copy(page, ZEROS.as_ptr(), ZEROS.len(), options) }
        }
        _ => uffd.zero(page, size, true),
    };
    if given != Err(UffdError::Changing) {
        fault.wake(uffd);
    }
}

/// Ends the program with an explanation.
pub(crate) fn end(
    uffd: &Userfaultfd,
    fault: &OpenFault,
    area: Option<Area>,
    thread: u32,
    stack: Option<&(dyn Fn() -> bool + Send + Sync)>,
) -> ! {
    let what = match fault.flags & 3 {
        1 => "written to a protected page",
        2 => "touched a page that is not mapped",
        _ => "touched a page that is missing",
    };
    let Area { start, len, .. } =
        area.unwrap_or(Area { start: fault.page, len: fault.page_size, page_size: 0 });
    say(format_args!(
        "deadlock: the JavaScript thread {thread} that handles the faults of this memory has {what}, at {:#x} (offset {} of \
         the mapping of {len} bytes at {start:#x}), and would wait for itself for ever. Use mapping.read() and write(), \
         touch the memory on another thread, or have a worker handle it.",
        fault.address,
        fault.address - start,
    ));
    // Where it faulted in its own code it is let go for the few instructions to its next check for interrupts, which ends
    // it. Inside a system call it could hand zeros out of the process.
    if is_in_user_mode(thread) && stack.is_some_and(|ask| ask()) {
        give_zeros(uffd, fault);
        std::thread::sleep(LAST_WORDS);
    }
    std::process::abort();
}
