//! uffd-wp-mremap with folios of every size that the kernel makes between a page and a transparent huge page, and with
//! those.

use std::fs;
use std::os::fd::AsFd;

use uffd::pagemap::Pagemap;
use uffd::{AnonymousOptions, Features, Mapping, MemfdOptions, Pages, transparent_huge_page_size};

use crate::memory::{Area, Memory};
use crate::wp_fork::frame;
use crate::wp_mremap::case;

const SETTINGS: &str = "/sys/kernel/mm/transparent_hugepage";

/// A setting of the system, put back when dropped.
struct Setting {
    path: String,
    before: String,
}

impl Setting {
    /// The alternatives are all shown, the one in use in brackets.
    fn set(path: String, value: &str) -> Option<Self> {
        let text = fs::read_to_string(&path).ok()?;
        let (_, rest) = text.split_once('[')?;
        let (before, _) = rest.split_once(']')?;
        fs::write(&path, value).ok()?;
        Some(Self { path, before: before.to_owned() })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        fs::write(&self.path, &self.before).unwrap();
    }
}

/// The sizes of folios that can be set by a file of this name; without the largest, which needs no setting.
fn sizes(name: &str) -> Vec<usize> {
    let Ok(entries) = fs::read_dir(SETTINGS) else { return Vec::new() };
    let mut sizes: Vec<usize> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join(name).is_file())
        .filter_map(|path| {
            path.file_name()?.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
        })
        .map(|kilobytes: usize| kilobytes << 10)
        .filter(|size| Some(*size) != transparent_huge_page_size())
        .collect();
    sizes.sort_unstable();
    sizes
}

/// Allows folios of all sizes where they are asked for.
fn allow(name: &str, value: &str) -> Vec<Setting> {
    let path = |size: &usize| format!("{SETTINGS}/hugepages-{}kB/{name}", size >> 10);
    sizes(name).iter().filter_map(|size| Setting::set(path(size), value)).collect()
}

/// A folio of this size, if it can be had: the kernel takes the largest that a mapping has room for.
fn folio(memory: Memory, size: usize) -> Option<Area> {
    let mapping = match memory {
        Memory::Anon => {
            let options = AnonymousOptions { pages: Pages::Transparent, shared: false };
            Mapping::anonymous(size, options)
        }
        _ => {
            let options = MemfdOptions { pages: Pages::Transparent, ..MemfdOptions::default() };
            Mapping::with_memfd(size, &options)
        }
    };
    let area = Area::of(memory, mapping.unwrap());
    area.fill();
    if memory == Memory::Shmem && Some(size) == transparent_huge_page_size() {
        area.mapping.collapse(0, area.mapping.len()).unwrap();
        // What was joined is mapped again when it is touched.
        assert!((0..area.count).all(|page| area.holds(page, page)));
    }
    is_folio(&area).then_some(area)
}

/// Whether it is one folio, by /proc/kpageflags: a head and its tails.
fn is_folio(area: &Area) -> bool {
    const HEAD: u64 = 1 << 15;
    const TAIL: u64 = 1 << 16;
    let Ok(flags) = fs::File::open("/proc/kpageflags") else { return false };
    let map = Pagemap::of_self().unwrap();
    let flags_of = |frame: u64| {
        let mut word = [0; 8];
        nix::sys::uio::pread(flags.as_fd(), &mut word, frame as i64 * 8).unwrap();
        u64::from_ne_bytes(word)
    };
    (0..area.count).all(|page| {
        let kind = if page == 0 { HEAD } else { TAIL };
        flags_of(frame(&map, area.at(page))) & (HEAD | TAIL) == kind
    })
}

fn each(memory: Memory, sizes: &[usize]) {
    if sizes.is_empty() {
        println!("skipped: the kernel makes no such folios");
    }
    for &size in sizes {
        for features in [Features::empty(), Features::EVENT_REMAP] {
            match folio(memory, size) {
                Some(area) => case(area, features),
                None => {
                    println!("skipped: no folio of {} kB could be had, or be told from others", size >> 10)
                }
            }
        }
    }
}

// The settings are the system's: this process puts them back whatever becomes of the other, which finds nothing to set.
#[test]
fn anon() {
    let _settings = allow("enabled", "madvise");
    crate::alone::run("wp_mremap_folios::anon", 0, || each(Memory::Anon, &sizes("enabled")));
}

#[test]
fn shmem() {
    let _settings = allow("shmem_enabled", "advise");
    crate::alone::run("wp_mremap_folios::shmem", 0, || each(Memory::Shmem, &sizes("shmem_enabled")));
}

fn largest(memory: Memory) {
    each(memory, &Vec::from_iter(transparent_huge_page_size()));
}

case!(anon_pmd, 0, || largest(Memory::Anon));

case!(shmem_pmd, 0, || largest(Memory::Shmem));
