//! FORK, REMAP and REMOVE events of a forked child, which touches its memory before, between and after them; the server
//! goes on with the child's userfaultfd, follows the memory to its new place, and lets go of what is released.

use std::io::pipe;
use std::os::fd::AsFd;

use uffd::{
    AnonymousOptions, CopyOptions, Event, EventBuffer, FaultKind, Features, Mapping, Modes, Pages,
    Userfaultfd,
};

use crate::forking::{fork, forked};
use crate::memory::{Area, Memory, Span, contents, copy_page, uffd};
use crate::serving::{Faults, wait};
use crate::support::finish;

/// What the server of the child has seen.
#[derive(Debug, Default)]
struct Seen {
    faults: Faults,
    remaps: Vec<(u64, u64, u64)>,
    removes: Vec<(u64, u64)>,
}

/// Serves the child until it has exited, from the pages of `area` wherever they are.
fn serve(
    of_child: &Userfaultfd,
    area: Area,
    write_protect: bool,
    exited: std::os::fd::BorrowedFd<'_>,
) -> Seen {
    let source = contents(area.count, area.page());
    let page = area.page();
    let mut base = area.start();
    let mut seen = Seen::default();
    let mut buffer = EventBuffer::new(16);
    loop {
        let readable = wait(of_child, exited);
        if of_child.read_events(&mut buffer).unwrap() == 0 && !readable {
            return seen;
        }
        for event in buffer.drain() {
            match event {
                Event::Fault(fault) => {
                    seen.faults.count(&fault);
                    if fault.kind == FaultKind::WriteProtect {
                        of_child.write_protect(fault.address, page as u64, false, true).unwrap();
                        continue;
                    }
                    let from = (fault.address - base) as usize;
                    let options = CopyOptions { write_protect, ..CopyOptions::default() };
                    let bytes = &source[from..from + page];
                    assert!(copy_page(of_child, fault.address, bytes, options), "a page twice");
                }
                Event::Remap { from, to, len } => {
                    seen.remaps.push((from, to, len));
                    base = to;
                }
                Event::Remove { start, end } => {
                    seen.removes.push((start, end));
                    of_child.unregister(start, end - start).unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// The child: tells by its exit code what went wrong. Makes no call that is not async-signal-safe.
fn child(here: Span, there: Span, release: i32, write: bool) -> i32 {
    let half = here.count() / 2;
    let touch = |span: Span, page: usize| {
        let right = span.holds(page, page);
        if write {
            span.poke(page, 0, span.peek(page, 0));
        }
        right
    };
    if !(0..half).all(|page| touch(here, page)) {
        return 1;
    }
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let (old, new) = (here.address() as *mut libc::c_void, there.address() as *mut libc::c_void);
    // SAFETY: both are memory of the child's that nothing refers to; the old place is not touched any more.
    let moved = unsafe { libc::mremap(old, here.len(), here.len(), flags, new) };
    if moved != new {
        return 2;
    }
    if !(0..half).all(|page| there.holds(page, page)) {
        return 3;
    }
    if !(half..there.count()).all(|page| touch(there, page)) {
        return 4;
    }
    // SAFETY: memory of the child's that nothing refers to.
    if unsafe { libc::madvise(new, there.len(), release) } != 0 {
        return 5;
    }
    if !(0..there.count()).all(|page| there.is_zero(page)) {
        return 6;
    }
    0
}

pub fn case(memory: Memory, write_protect: bool) {
    let features = Features::EVENT_FORK | Features::EVENT_REMAP | Features::EVENT_REMOVE;
    let Some(uffd) = uffd(features) else { return };
    let area = Area::usual(memory);
    let wp = if write_protect { Modes::WRITE_PROTECT } else { Modes::empty() };
    area.register(uffd, Modes::MISSING | wp);
    let here = area.span();
    let there = free_place(&area);
    let release = if memory.is_shared() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    let (exited, exits) = pipe().unwrap();
    // SAFETY: `child` touches memory and makes bare system calls.
    let forking = unsafe { fork(move || child(here, there, release, write_protect)) };
    let of_child = forked(uffd);
    let ended = finish(&forking);
    let waiter = std::thread::spawn(move || {
        let code = ended.exit_code();
        drop(exits);
        code
    });

    let seen = serve(&of_child, area, write_protect, exited.as_fd());

    assert_eq!(waiter.join().unwrap(), 0, "{seen:?}");
    let writes = if write_protect { area.count } else { 0 };
    assert_eq!(seen.faults, Faults { missing: area.count, minor: 0, write_protect: writes });
    assert_eq!(seen.remaps, [(here.address(), there.address(), area.len())]);
    assert_eq!(seen.removes, [(there.address(), there.address() + area.len())]);
    assert!(of_child.is_dead() && !uffd.is_dead());
    assert_eq!(uffd.read_events(&mut EventBuffer::new(1)).unwrap(), 0, "all of it is the child's");
}

/// Addresses for the child to move its memory to: aligned for huge pages, and used by nobody.
fn free_place(area: &Area) -> Span {
    let options = AnonymousOptions { pages: Pages::Transparent, shared: false };
    let place = Box::leak(Box::new(Mapping::anonymous(area.mapping.len(), options).unwrap()));
    // SAFETY: mapped for ever in this process; the child uses it after moving the area there.
    unsafe { Span::new(place.address(), area.page(), area.count) }
}

cases!(|memory| case(memory, false); all);
