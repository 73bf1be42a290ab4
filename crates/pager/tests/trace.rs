//! Recordings: the file, its damages, and what is made of several.
//!
//! `USERFAULTFD_FUZZ_ROUNDS` says how many damaged files are read (default: 100 000).
#![allow(clippy::single_range_in_vec_init, reason = "one range of pages, not its numbers")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/handshakes.rs"]
mod handshakes;
mod support;

use std::path::Path;
use std::sync::Arc;

use pager::{
    FileSource, Overlay, OverlaySource, PageSource, PagerError, Trace, TraceEnd, TraceFault, TraceHeader,
    TraceKind, ZeroSource,
};

use handshakes::Random;
use support::{Bytes, PAGE, image};

const IMAGE_PAGES: u64 = 1 << 16;

fn header() -> TraceHeader {
    TraceHeader {
        page_size: 4096,
        image_size: IMAGE_PAGES * 4096,
        identity: [7; 32],
        started_ms: 1_800_000_000_000,
    }
}

/// A fault that brought pages around it.
fn fault(time_ns: u64, page: u64, before: u32, pages: u32) -> TraceFault {
    TraceFault { time_ns, kind: TraceKind::Missing, write: false, page, before, pages, latency_ns: 15_000 }
}

fn trace(faults: Vec<TraceFault>) -> Trace {
    Trace { header: header(), faults, end: TraceEnd::Complete, dropped: 0 }
}

/// Faults as they come: in the order of time, anywhere.
fn some_faults(random: &mut Random, count: usize) -> Vec<TraceFault> {
    let mut time_ns = 0;
    let mut one = || {
        let up_to_bits = |random: &mut Random| {
            let bits = 1 + random.below(30);
            random.below(1 << bits) as u64
        };
        time_ns += up_to_bits(random);
        let pages = random.below(17) as u32;
        let before = if pages > 0 { random.below(pages as usize) as u32 } else { 0 };
        let page = 16 + random.below(IMAGE_PAGES as usize - 32) as u64;
        let kind = [TraceKind::Missing, TraceKind::Minor, TraceKind::WriteProtect][random.below(3)];
        let latency_ns = up_to_bits(random);
        TraceFault { time_ns, kind, write: random.below(2) == 1, page, before, pages, latency_ns }
    };
    (0..count).map(|_| one()).collect()
}

#[test]
fn a_recording_comes_back_as_it_was_written() {
    let mut random = Random::new(3);
    for count in [0, 1, 1023, 1024, 1025, 5000] {
        for (end, dropped) in [(TraceEnd::Complete, 0), (TraceEnd::Full, 12_345), (TraceEnd::Torn, 0)] {
            let written = Trace { end, dropped, ..trace(some_faults(&mut random, count)) };

            assert_eq!(Trace::parse(&written.encode()).unwrap(), written);
        }
    }
}

#[test]
fn a_fault_takes_about_ten_bytes() {
    // Windows of 16 pages all over the image, one every 20 us.
    let mut random = Random::new(5);
    let faults = (0..10_000).map(|nth| {
        let window = random.below(IMAGE_PAGES as usize / 16) as u64 * 16;
        TraceFault {
            latency_ns: 15_000 + nth,
            ..fault(nth * 20_000, window + nth % 16, (nth % 16) as u32, 16)
        }
    });
    let bytes = trace(faults.collect()).encode().len();

    assert!(bytes < 10_000 * 12, "{bytes} bytes");
}

#[test]
fn what_was_answered_out_of_order_is_read_in_the_order_of_its_faults() {
    let out_of_order =
        vec![fault(500, 9, 0, 1), fault(100, 700, 0, 1), fault(100, 3, 0, 1), fault(2, 4, 0, 1)];
    let read = Trace::parse(&trace(out_of_order).encode()).unwrap();

    let pages: Vec<u64> = read.faults.iter().map(|fault| fault.page).collect();
    assert_eq!(pages, [4, 700, 3, 9], "those of one moment stay as they were written");
}

#[test]
fn a_file_torn_off_anywhere_is_read_up_to_its_last_whole_block() {
    let written = trace(some_faults(&mut Random::new(11), 3000));
    let bytes = written.encode();
    let mut counts = Vec::new();
    for end in 0..bytes.len() {
        match Trace::parse(&bytes[..end]) {
            Err(reason) => assert!(end < 64, "{end}: {reason}"),
            Ok(read) => {
                assert_eq!(read.end, TraceEnd::Torn);
                assert_eq!(read.faults, written.faults[..read.faults.len()]);
                counts.push(read.faults.len());
            }
        }
    }
    counts.dedup();
    assert_eq!(counts, [0, 1024, 2048, 3000]);
}

#[test]
fn whatever_becomes_of_the_bytes_what_is_read_was_written() {
    let mut random = Random::new(17);
    let written = trace(some_faults(&mut random, 2500));
    let bytes = written.encode();
    let rounds =
        std::env::var("USERFAULTFD_FUZZ_ROUNDS").map_or(100_000, |rounds| rounds.parse().expect("a number"));
    let (mut whole, mut refused) = (0, 0);
    for _ in 0..rounds {
        // Cut to a few blocks at most, so that many can be read.
        let mut damaged = bytes.clone();
        match random.below(4) {
            0 => damaged.truncate(random.below(damaged.len())),
            1 => {
                let at = random.below(damaged.len());
                damaged[at] ^= 1 << random.below(8);
            }
            2 => {
                let (from, to) = (random.below(damaged.len()), random.below(damaged.len()));
                damaged.copy_within(from.min(to)..from.max(to).min(from.min(to) + 64), from.min(to) / 2);
            }
            _ => damaged.extend((0..random.below(64)).map(|_| random.below(256) as u8)),
        }
        match Trace::parse(&damaged) {
            Err(_) => refused += 1,
            Ok(read) => {
                assert_eq!(read.header, written.header);
                assert_eq!(read.faults, written.faults[..read.faults.len()]);
                whole += usize::from(read.end == TraceEnd::Complete);
            }
        }
    }
    println!("{whole} whole, {refused} refused");
    assert!(whole > 0 && refused > 0);
}

#[test]
fn any_bytes_behind_a_good_checksum_are_read_without_harm() {
    let mut random = Random::new(23);
    let head = trace(Vec::new()).encode();
    for _ in 0..20_000 {
        let mut bytes = head[..64].to_vec();
        let payload: Vec<u8> = (0..random.below(60)).map(|_| random.below(256) as u8).collect();
        let kind = [1, 1, 1, 2, 3][random.below(5)];
        let mut block = (kind | (payload.len() as u32) << 8).to_le_bytes().to_vec();
        block.extend((random.below(12) as u32).to_le_bytes());
        let mut crc = crc32fast::Hasher::new();
        crc.update(&block);
        crc.update(&payload);
        bytes.extend(&block);
        bytes.extend(crc.finalize().to_le_bytes());
        bytes.extend(&payload);

        let read = Trace::parse(&bytes).unwrap();

        assert!(
            read.faults.iter().all(|fault| fault.brought().end <= IMAGE_PAGES && fault.page < IMAGE_PAGES)
        );
        assert!(read.working_set().len() <= 12 * 512);
        assert_eq!(Trace::parse(&read.encode()).unwrap().faults, read.faults);
    }
}

#[test]
fn what_is_no_recording_is_refused_by_name() {
    let good = trace(Vec::new()).encode();
    let of = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        Trace::parse(&bytes).unwrap_err()
    };

    assert!(of(&|bytes| bytes.clear()).contains("in the middle of its head"));
    assert!(of(&|bytes| bytes.truncate(30)).contains("30 bytes"));
    assert!(of(&|bytes| bytes[0] = b'X').contains("no recording"));
    assert!(of(&|bytes| bytes[8] = 2).contains("version 2"));
    assert!(of(&|bytes| bytes[30] ^= 1).contains("head is damaged"));
    let nowhere = Trace::read(Path::new("/nonexistent/recording")).unwrap_err();
    assert_eq!((nowhere.code(), nowhere.errno()), ("ERR_UFFD_TRACE", Some(libc::ENOENT)));
}

#[test]
fn a_file_is_what_it_was_until_the_new_one_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording");
    let first = trace(vec![fault(1, 5, 0, 1)]);

    first.write(&path).unwrap();
    assert_eq!(Trace::read(&path).unwrap(), first);
    trace(Vec::new()).write(&path).unwrap();
    assert_eq!(Trace::read(&path).unwrap().faults, []);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
    let refused = first.write(&folder.path().join("no/such/folder")).unwrap_err();
    assert_eq!(refused.code(), "ERR_UFFD_TRACE");
}

#[test]
fn the_working_set_has_every_page_once_in_the_order_of_its_first_fault() {
    let faults = vec![fault(1, 40, 8, 16), fault(2, 3, 0, 0), fault(3, 49, 1, 4), fault(4, 33, 1, 2)];

    assert_eq!(trace(faults).working_set(), [32..52]);
    let apart = vec![fault(1, 40, 0, 1), fault(2, 10, 0, 2), fault(3, 9, 0, 4)];
    assert_eq!(trace(apart).working_set(), [40..41, 10..12, 9..10, 12..13]);
}

#[test]
fn several_become_what_any_or_what_all_of_them_wanted_in_the_order_of_the_average() {
    let one = trace(vec![fault(10, 1, 0, 1), fault(20, 2, 0, 1), fault(30, 3, 0, 1)]);
    let other = trace(vec![fault(100, 3, 0, 1), fault(200, 2, 0, 1), fault(300, 9, 0, 1)]);
    let pages = |trace: &Trace| trace.working_set();

    // 1 is first of one, 2 in the middle of both, 3 last and first, 9 last of the other.
    let merged = Trace::merge(&[&one, &other]).unwrap();
    assert_eq!(pages(&merged), [1..4, 9..10]);
    let common = Trace::intersect(&[&one, &other]).unwrap();
    assert_eq!(pages(&common), [2..4]);
    assert_eq!(pages(&Trace::intersect(&[&one]).unwrap()), [1..4]);
    assert_eq!(Trace::parse(&merged.encode()).unwrap(), merged, "they are recordings like others");

    let reordered = trace(vec![fault(1, 8, 0, 1), fault(2, 1, 0, 1), fault(3, 2, 0, 1)]);
    assert_eq!(pages(&Trace::merge(&[&reordered, &reordered]).unwrap()), [8..9, 1..3]);
}

#[test]
fn recordings_of_different_images_do_not_go_together() {
    let one = trace(Vec::new());
    let of = |change: &dyn Fn(&mut TraceHeader)| {
        let mut other = trace(Vec::new());
        change(&mut other.header);
        Trace::merge(&[&one, &other]).unwrap_err()
    };

    for (change, what) in [
        (&(|header: &mut TraceHeader| header.image_size += 4096) as &dyn Fn(&mut TraceHeader), "image"),
        (&|header| header.identity[0] ^= 1, "image"),
        (&|header| header.page_size *= 2, "page size"),
    ] {
        let error = of(change);
        assert_eq!(error.code(), "ERR_UFFD_TRACE_IMAGE");
        assert!(error.to_string().contains(what), "{error}");
    }
    assert!(matches!(Trace::intersect(&[]), Err(PagerError::TraceImage(_))));
}

#[test]
fn a_copy_of_an_image_is_the_same_image_and_another_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = image(300);
    let path = folder.path().join("copy");
    std::fs::write(&path, &bytes).unwrap();
    let original: Arc<dyn PageSource> = Arc::new(Bytes(bytes.clone()));
    let mut recorded = trace(Vec::new());
    recorded.header = TraceHeader::of(&original, 4096).unwrap();

    recorded.check(&original).unwrap();
    recorded.check(&(Arc::new(FileSource::open(&path).unwrap()) as Arc<dyn PageSource>)).unwrap();
    let own = Overlay { offset: 0, bytes: vec![1; PAGE] };
    let overlaid: Arc<dyn PageSource> =
        Arc::new(OverlaySource::new(Arc::clone(&original), vec![own]).unwrap());
    recorded.check(&overlaid).unwrap();

    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    for (other, what) in [
        (Arc::new(Bytes(changed)) as Arc<dyn PageSource>, "another image"),
        (Arc::new(Bytes(bytes[PAGE..].to_vec())), "bytes, this one has"),
        (Arc::new(ZeroSource::new(bytes.len() as u64)), "another image"),
    ] {
        let error = recorded.check(&other).unwrap_err();
        assert_eq!(error.code(), "ERR_UFFD_TRACE_IMAGE");
        assert!(error.to_string().contains(what), "{error}");
    }
}
