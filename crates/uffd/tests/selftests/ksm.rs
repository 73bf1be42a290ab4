//! ksm_functional_tests, `unmerge_uffd_wp`: merged pages that are write-protected are taken apart when they are not to be
//! merged any more, and stay protected.

use std::collections::HashSet;
use std::fs;

use uffd::pagemap::Pagemap;
use uffd::{FaultKind, Features, Modes};

use crate::memory::{Area, Memory, uffd};
use crate::processes::until;
use crate::support::{elsewhere, fault, finish};
use crate::wp_fork::frame;

const KSM: &str = "/sys/kernel/mm/ksm";

/// The scanner runs until this is dropped.
struct Scanner {
    before: Vec<(&'static str, String)>,
}

impl Scanner {
    fn start() -> Result<Self, std::io::Error> {
        let mut scanner = Self { before: Vec::new() };
        for (name, value) in [("sleep_millisecs", "0"), ("pages_to_scan", "1000"), ("run", "1")] {
            let path = format!("{KSM}/{name}");
            let before = fs::read_to_string(&path)?;
            fs::write(path, value)?;
            scanner.before.push((name, before));
        }
        Ok(scanner)
    }
}

impl Drop for Scanner {
    fn drop(&mut self) {
        for (name, value) in self.before.iter().rev() {
            fs::write(format!("{KSM}/{name}"), value).unwrap();
        }
    }
}

fn full_scans() -> u64 {
    fs::read_to_string(format!("{KSM}/full_scans")).unwrap().trim().parse().unwrap()
}

fn frames(area: &Area, map: &Pagemap) -> usize {
    (0..area.count).map(|page| frame(map, area.at(page))).collect::<HashSet<_>>().len()
}

fn advise(area: &Area, advice: i32) {
    // SAFETY: an area, to which nothing refers.
    let result = unsafe { libc::madvise(area.mapping.as_ptr().cast(), area.mapping.len(), advice) };
    assert_eq!(result, 0, "madvise {advice}: {}", std::io::Error::last_os_error());
}

fn case(area: Area) {
    let Some(uffd) = uffd(Features::empty()) else { return };
    let map = Pagemap::of_self().unwrap();
    // Every page alike, and like no other page of the system.
    let bytes: Vec<u8> = (0..area.page()).map(|at| (at as u32 ^ std::process::id()) as u8 | 1).collect();
    (0..area.count).for_each(|page| area.mapping.write(page * area.page(), &bytes).unwrap());
    if frame(&map, area.start()) == 0 {
        println!("skipped: the page map does not tell frames");
        return;
    }
    assert_eq!(frames(&area, &map), area.count);
    advise(&area, libc::MADV_MERGEABLE);
    let start = full_scans();
    until("pages were merged", || full_scans() >= start + 3 && frames(&area, &map) == 1);

    area.register(uffd, Modes::WRITE_PROTECT);
    uffd.write_protect(area.start(), area.len(), true, true).unwrap();
    advise(&area, libc::MADV_UNMERGEABLE);

    assert_eq!(frames(&area, &map), area.count, "each has its own again");
    assert!((0..area.count).all(|page| area.bytes(page) == bytes));
    assert!((0..area.count).all(|page| area.entry(&map, page).is_write_protected()));
    let written = elsewhere(move || area.span().poke(0, 0, 0));
    let told = fault(uffd);
    uffd.write_protect(area.start(), area.page() as u64, false, true).unwrap();
    finish(&written);
    assert_eq!((told.kind, told.address), (FaultKind::WriteProtect, area.start()));
}

// The scanner is the system's: this process stops it again whatever becomes of the other.
#[test]
fn unmerge_uffd_wp() {
    let scanner = match Scanner::start() {
        Ok(scanner) => scanner,
        Err(error) => {
            println!("skipped: no KSM: {error}");
            return;
        }
    };
    crate::alone::run("ksm::unmerge_uffd_wp", 0, || case(Area::new(Memory::Anon, 16)));
    drop(scanner);
}
