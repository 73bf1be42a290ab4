//! pagemap_ioctl, the patterns it tries on every kind of memory: what is new was not written; all; all but the first and the
//! last; the one in the middle; two in the middle; each found once.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

use uffd::pagemap::ScanOptions;
use uffd::{FileAccess, FileOptions, Mapping};

use crate::memory::{Area, Memory};
use crate::processes::PAGE;
use crate::tracked::{Found, Tracked};

const NONE: Found = Found::new();

fn case(area: Area) {
    let Some(tracked) = Tracked::new(area) else { return };
    let (count, middle) = (area.count, area.count / 2);
    assert_eq!(tracked.written(), NONE, "all new");

    area.fill();
    assert_eq!(tracked.written(), [(0, count)], "all written");
    assert_eq!(tracked.written(), [(0, count)], "looking changes nothing");
    assert_eq!(tracked.take(), [(0, count)]);
    assert_eq!(tracked.take(), NONE, "taken before");

    tracked.write(1..count - 1);
    assert_eq!(tracked.take(), [(1, count - 1)], "all but the first and the last");
    tracked.write([middle]);
    assert_eq!(tracked.written(), [(middle, middle + 1)], "the middle");
    tracked.write([middle - 1]);
    assert_eq!(tracked.take(), [(middle - 1, middle + 1)], "two in the middle");
    tracked.write([0, count - 1]);
    assert_eq!(tracked.take(), [(0, 1), (count - 1, count)], "the first and the last");

    // Protects without telling; by WRITEPROTECT it comes to the same.
    tracked.write(0..count);
    let silent = ScanOptions { max_regions: 0, ..ScanOptions::take_written() };
    assert_eq!(tracked.scan(&silent).regions, []);
    assert_eq!(tracked.written(), NONE);
    tracked.write(0..count);
    tracked.protect();
    assert_eq!(tracked.take(), NONE);
    assert!((0..count).all(|page| area.span().peek(page, 0) == 7), "no write was lost");
}

cases!(|memory| case(Area::usual(memory)); all);

// More than one page table covers.
case!(anon_large, 0, || case(Area::new(Memory::Anon, 1500)));

case!(file, 0, || {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE);
    let file = match options.open(env!("CARGO_TARGET_TMPDIR")) {
        Ok(file) => file,
        Err(error) => {
            println!("skipped: no file without a name where tests may write: {error}");
            return;
        }
    };
    file.set_len(64 * PAGE as u64).unwrap();
    let options = FileOptions { access: FileAccess::Shared, ..FileOptions::default() };
    case(Area::of(Memory::Shmem, Mapping::of_file(file.into(), options).unwrap()));
});
