//! `userfaultfd-faulter SOCKET FEATURES`: a process that faults when it is told to, on threads of its own, for the tests of
//! handlers. It makes a userfaultfd, hands it over on a Unix socket (`-`: not before it is told to `offer` it), and obeys lines of standard input, each on a thread of its
//! own: `ID COMMAND WORDS...`. The answer to each is `ID ok WORDS...` or `ID error TEXT`, when it is done.
//!
//! ```text
//! map PAGES                   address of new private memory
//! register ADDRESS LEN MODES  bits: 1 missing, 2 write-protect
//! load ADDRESS                the byte there, and the id of the thread that loaded it
//! store ADDRESS BYTE          the id of the thread
//! dump ADDRESS LEN            the bytes, in hexadecimal
//! look ADDRESS                has the kernel load the page: the word of 8 bytes that all of it consists of, in hexadecimal;
//!                             `mixed` where it does not; `poisoned` where it cannot be loaded
//! peek ADDRESS                the same, loaded by this process: poison ends it
//! discard ADDRESS LEN         madvise(MADV_DONTNEED)
//! unmap ADDRESS LEN           munmap
//! remap ADDRESS OLD NEW       mremap, which may move: the new address
//! fence ADDRESS               maps a page without access rights there: what lies before it has to move to grow
//! fork ADDRESS                forks; the byte that the child loads there
//! storm ADDRESS PAGES THREADS SEED
//!                             each thread has the kernel load from every page in an order of its own: how many it could
//!                             load from, and then the numbers of the pages it could not (poisoned), of every thread. The
//!                             first byte of page N has to be N % 251 + 1
//! offer SOCKET ADDRESS REGIONS PAGES APART
//!                             hands the userfaultfd over as Firecracker does: so many regions of so many pages, one behind
//!                             the other, whose bytes are so far apart in the image
//! bench ADDRESS PAGES THREADS each thread loads from its share of the pages: nanoseconds in all, the median and the 99th
//!                             percentile of one load
//! ```
//! Like its sibling it shares no code with what it tests.

use std::fmt::Display;
use std::io::{self, BufRead, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::ptr;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

const PAGE: usize = 4096;
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: u32 = 0xc018_aa3f;
const UFFDIO_REGISTER: u32 = 0xc020_aa00;
const USERFAULTFD_IOC_NEW: u32 = 0xaa00;

type Answer = Result<String, String>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("userfaultfd-faulter: {error}");
            ExitCode::from(2)
        }
    }
}

fn failed(what: &str) -> String {
    format!("{what}: {}", io::Error::last_os_error())
}

fn text(error: impl Display) -> String {
    error.to_string()
}

fn run() -> Result<(), String> {
    let mut words = std::env::args().skip(1);
    let socket = words.next().ok_or("SOCKET is missing")?;
    let features = number(&words.next().ok_or("FEATURES is missing")?)?;
    let uffd = create(features as u64)?;
    if socket != "-" {
        hand_over(&socket, uffd, &[1])?;
    }
    for line in io::stdin().lock().lines() {
        let line = line.map_err(text)?;
        thread::spawn(move || {
            let mut words = line.split_whitespace();
            let id = words.next().unwrap_or("?");
            let answer = match obey(uffd, &words.collect::<Vec<_>>()) {
                Ok(words) => format!("{id} ok {words}\n"),
                Err(error) => format!("{id} error {error}\n"),
            };
            // Whoever drives this process may have gone.
            let _ = io::stdout().lock().write_all(answer.as_bytes());
        });
    }
    Ok(())
}

fn create(features: u64) -> Result<i32, String> {
    // SAFETY: a path that ends with a zero.
    let device = unsafe { libc::open(c"/dev/userfaultfd".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let uffd = if device >= 0 {
        // SAFETY: takes its flags by value and no memory.
        unsafe { libc::ioctl(device, USERFAULTFD_IOC_NEW as libc::Ioctl, flags) }
    } else {
        // SAFETY: as above.
        (unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }) as i32
    };
    if uffd < 0 {
        return Err(failed("userfaultfd"));
    }
    let mut api = [UFFD_API, features, 0];
    // SAFETY: three words, which live across the call.
    match unsafe { libc::ioctl(uffd, UFFDIO_API as libc::Ioctl, api.as_mut_ptr()) } {
        0 => Ok(uffd),
        _ => Err(failed("UFFDIO_API")),
    }
}

/// Firecracker keeps its connection as long as it lives, and so does this.
fn hand_over(socket: &str, fd: i32, bytes: &[u8]) -> Result<(), String> {
    let stream = UnixStream::connect(socket).map_err(text)?;
    send(&stream, fd, bytes)?;
    std::mem::forget(stream);
    Ok(())
}

fn send(stream: &UnixStream, fd: i32, bytes: &[u8]) -> Result<(), String> {
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = [0_u64; 4];
    // SAFETY: all zeros is a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: computes a number.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as _;
    // SAFETY: there is room for a header.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: computes a number.
    let len = unsafe { libc::CMSG_LEN(4) };
    let fields =
        libc::cmsghdr { cmsg_len: len as _, cmsg_level: libc::SOL_SOCKET, cmsg_type: libc::SCM_RIGHTS };
    // SAFETY: the header lies in `control`, which is aligned for it.
    unsafe { header.write(fields) };
    // SAFETY: behind the header there is room for a descriptor.
    let data = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: as above; it need not be aligned.
    unsafe { data.cast::<i32>().write_unaligned(fd) };
    // SAFETY: everything that the message points to lives across the call.
    match unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, 0) } {
        sent if usize::try_from(sent) == Ok(bytes.len()) => Ok(()),
        _ => Err(failed("sendmsg")),
    }
}

fn number(word: &str) -> Result<usize, String> {
    let parsed = word.strip_prefix("0x").map_or_else(|| word.parse(), |hex| usize::from_str_radix(hex, 16));
    parsed.map_err(|error| format!("{word}: {error}"))
}

fn thread_id() -> i32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

fn load(address: usize) -> u8 {
    // SAFETY: the driver names memory that is mapped here; nothing in this process refers to it.
    unsafe { ptr::with_exposed_provenance::<u8>(address).read_volatile() }
}

fn pointer(address: usize) -> *mut libc::c_void {
    ptr::with_exposed_provenance_mut(address)
}

fn obey(uffd: i32, words: &[&str]) -> Answer {
    let (&command, rest) = words.split_first().ok_or("no command")?;
    if let ("offer", Some((&socket, rest))) = (command, rest.split_first()) {
        return offer(uffd, socket, rest);
    }
    let numbers = rest.iter().map(|word| number(word)).collect::<Result<Vec<_>, _>>()?;
    match (command, numbers.as_slice()) {
        ("map", &[pages]) => map(pages * PAGE).map(|address| address.to_string()),
        ("register", &[address, len, modes]) => register(uffd, address, len, modes),
        ("load", &[address]) => Ok(format!("{} {}", load(address), thread_id())),
        ("store", &[address, byte]) => {
            // SAFETY: as in `load`.
            unsafe { pointer(address).cast::<u8>().write_volatile(byte as u8) };
            Ok(thread_id().to_string())
        }
        ("dump", &[address, len]) => {
            Ok((address..address + len).map(|at| format!("{:02x}", load(at))).collect())
        }
        ("look", &[address]) => Ok(look(address)),
        ("peek", &[address]) => Ok(word_of(|at| Some(load(address + at)))),
        ("discard", &[address, len]) => {
            // SAFETY: the driver names memory of its own; nothing in this process refers to it.
            done("madvise", unsafe { libc::madvise(pointer(address), len, libc::MADV_DONTNEED) })
        }
        ("unmap", &[address, len]) => {
            // SAFETY: as above.
            done("munmap", unsafe { libc::munmap(pointer(address), len) })
        }
        ("remap", &[address, old, new]) => remap(address, old, new),
        ("fence", &[address]) => fence(address),
        ("fork", &[address]) => fork(address),
        ("bench", &[address, pages, threads]) => bench(address, pages, threads),
        ("storm", &[address, pages, threads, seed]) => storm(address, pages, threads, seed),
        _ => Err(format!("unknown: {}", words.join(" "))),
    }
}

fn done(what: &str, status: i32) -> Answer {
    if status == 0 { Ok(String::new()) } else { Err(failed(what)) }
}

fn map(len: usize) -> Result<usize, String> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // Room behind it, so that it is no neighbour of anything and can grow where it is.
    // SAFETY: new memory, wherever there is room.
    let address = unsafe { libc::mmap(ptr::null_mut(), len * 4, libc::PROT_NONE, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(failed("mmap"));
    }
    // SAFETY: inside of what was just reserved.
    let behind = unsafe { address.byte_add(len) };
    // SAFETY: as above; nobody has it.
    unsafe { libc::munmap(behind, len * 3) };
    // SAFETY: as above.
    if unsafe { libc::mprotect(address, len, protection) } != 0 {
        return Err(failed("mprotect"));
    }
    // SAFETY: as above. Huge pages would fill more than was asked for.
    unsafe { libc::madvise(address, len, libc::MADV_NOHUGEPAGE) };
    Ok(address.expose_provenance())
}

fn register(uffd: i32, address: usize, len: usize, modes: usize) -> Answer {
    let mut argument = [address as u64, len as u64, modes as u64, 0];
    // SAFETY: four words, which live across the call.
    done("UFFDIO_REGISTER", unsafe {
        libc::ioctl(uffd, UFFDIO_REGISTER as libc::Ioctl, argument.as_mut_ptr())
    })
}

fn remap(address: usize, old: usize, new: usize) -> Answer {
    // SAFETY: the driver names memory of its own; nothing in this process refers to it.
    let moved = unsafe { libc::mremap(pointer(address), old, new, libc::MREMAP_MAYMOVE) };
    if moved == libc::MAP_FAILED { Err(failed("mremap")) } else { Ok(moved.expose_provenance().to_string()) }
}

fn fence(address: usize) -> Answer {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: only where nothing is.
    let fence = unsafe { libc::mmap(pointer(address), PAGE, libc::PROT_NONE, flags, -1, 0) };
    if fence == libc::MAP_FAILED { Err(failed("mmap")) } else { Ok(String::new()) }
}

/// The child does nothing but load and exit: nothing that needs a lock another thread may hold.
fn fork(address: usize) -> Answer {
    // SAFETY: see above.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(failed("fork")),
        // SAFETY: ends the child at once.
        0 => unsafe { libc::_exit(i32::from(load(address))) },
        _ => {
            let mut status = 0;
            // SAFETY: the status lives across the call.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
            Ok(libc::WEXITSTATUS(status).to_string())
        }
    }
}

/// Bytes that the kernel loads: nothing where a page is poisoned, which would end this process.
fn load_checked<const LEN: usize>(address: usize) -> Option<[u8; LEN]> {
    let mut bytes = [0_u8; LEN];
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: LEN };
    let remote = libc::iovec { iov_base: pointer(address), iov_len: LEN };
    let process = std::process::id() as i32;
    // SAFETY: as many bytes on either side; the kernel checks the remote one.
    let read = unsafe { libc::process_vm_readv(process, &raw const local, 1, &raw const remote, 1, 0) };
    (read == LEN as isize).then_some(bytes)
}

fn look(address: usize) -> String {
    let bytes = load_checked::<PAGE>(address);
    word_of(|at| bytes.as_ref().and_then(|bytes| bytes.get(at).copied()))
}

/// What a page consists of.
fn word_of(byte: impl Fn(usize) -> Option<u8>) -> String {
    const WORD: usize = 8;
    let Some(bytes) = (0..PAGE).map(byte).collect::<Option<Vec<u8>>>() else { return "poisoned".to_owned() };
    let mut words = bytes.chunks(WORD);
    let first = words.next().unwrap_or_default();
    if words.any(|word| word != first) {
        return "mixed".to_owned();
    }
    first.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn offer(uffd: i32, socket: &str, words: &[&str]) -> Answer {
    let numbers = words.iter().map(|word| number(word)).collect::<Result<Vec<_>, _>>()?;
    let &[address, regions, pages, apart] = numbers.as_slice() else {
        return Err("offer SOCKET ADDRESS REGIONS PAGES APART".to_owned());
    };
    let size = pages * PAGE;
    let region = |at: usize| {
        format!(
            r#"{{"base_host_virt_addr":{},"size":{size},"offset":{},"page_size":{PAGE},"page_size_kib":{PAGE}}}"#,
            address + at * size,
            at * apart
        )
    };
    let list: Vec<String> = (0..regions).map(region).collect();
    hand_over(socket, uffd, format!("[{}]", list.join(",")).as_bytes())?;
    Ok(String::new())
}

fn storm(address: usize, pages: usize, threads: usize, seed: usize) -> Answer {
    let visit = move |thread: usize| -> Result<Vec<usize>, String> {
        let mut state = (seed * 1000 + thread + 1) as u64;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize
        };
        let mut order: Vec<usize> = (0..pages).collect();
        for index in (1..pages).rev() {
            order.swap(index, random() % (index + 1));
        }
        let mut poisoned = Vec::new();
        for &page in &order {
            match load_checked::<1>(address + page * PAGE) {
                Some([found]) if usize::from(found) == page % 251 + 1 => {}
                Some([found]) => return Err(format!("page {page} begins with {found}")),
                None => poisoned.push(page),
            }
        }
        Ok(poisoned)
    };
    let running: Vec<_> = (0..threads).map(|thread| thread::spawn(move || visit(thread))).collect();
    let mut poisoned = Vec::new();
    for thread in running {
        poisoned.extend(thread.join().map_err(|_| "a thread panicked".to_owned())??);
    }
    let numbers = [pages * threads - poisoned.len()].into_iter().chain(poisoned);
    Ok(numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(" "))
}

fn bench(address: usize, pages: usize, threads: usize) -> Answer {
    let barrier = Arc::new(Barrier::new(threads));
    let visit = move |thread: usize, barrier: &Barrier| {
        let mut times = Vec::with_capacity(pages / threads + 1);
        barrier.wait();
        let start = Instant::now();
        for page in (thread..pages).step_by(threads) {
            let before = Instant::now();
            load(address + page * PAGE);
            times.push(before.elapsed().as_nanos());
        }
        (start, Instant::now(), times)
    };
    let start_one = |thread: usize| {
        let barrier = Arc::clone(&barrier);
        thread::spawn(move || visit(thread, &barrier))
    };
    let running: Vec<_> = (0..threads).map(start_one).collect();
    let mut seen = Vec::new();
    for thread in running {
        seen.push(thread.join().map_err(|_| "a thread panicked")?);
    }
    let first = seen.iter().map(|one| one.0).min().ok_or("no threads")?;
    let last = seen.iter().map(|one| one.1).max().ok_or("no threads")?;
    let mut times: Vec<u128> = seen.into_iter().flat_map(|one| one.2).collect();
    times.sort_unstable();
    let at = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or_default();
    Ok(format!("{} {} {}", last.duration_since(first).as_nanos(), at(50), at(99)))
}
