//! Records that cannot be trusted: each is refused by name and nothing is done to the session; what is not refused does no harm.

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use pager::{EndReason, KeptDescriptors, Notice, Pager, PagerError, PagerOptions, Rest};
use uffd::{Mapping, MemfdOptions, Modes};

use crate::handshakes::Random;
use crate::memory::{Served, at, get, page, put, resume, served, try_resume};
use crate::support::area::{Area, Made, all_events, ended, register};
use crate::support::kept::Kept;
use crate::support::{DEADLINE, finish};

const PAGES: usize = 200;

fn orphaned() -> Option<Served> {
    let mut served = served(PAGES, all_events(), Modes::MISSING, |_| {})?;
    assert!(served.area.part(3, 1).read() == page(&served.bytes, 3));
    served.area.part(40, 8).unmap();
    served.process = served.process.replaced();
    Some(served)
}

/// A memfd of these bytes.
fn memfd_of(bytes: &[u8], sealed: bool) -> OwnedFd {
    let options = MemfdOptions { fixed_size: sealed, ..MemfdOptions::default() };
    let mapping = Mapping::with_memfd(bytes.len(), &options).unwrap();
    mapping.write(0, bytes).unwrap();
    mapping.memfd().unwrap().try_clone_to_owned().unwrap()
}

/// A copy of a session's record, with something done to it.
fn copy_of(bytes: &[u8], kept: &Kept) -> Kept {
    let own = |fd: &OwnedFd| fd.try_clone().unwrap();
    Kept {
        session: kept.session.clone(),
        uffd: own(&kept.uffd),
        record: memfd_of(bytes, true),
        process: None,
        connection: None,
    }
}

fn bytes_of(kept: &Kept) -> Vec<u8> {
    let words = kept.words();
    (0..words.len()).flat_map(|index| get(&words, index).to_ne_bytes()).collect()
}

fn refused(pager: &Pager, kept: &Kept) -> String {
    match try_resume(pager, kept, PAGES).0 {
        Err(error @ PagerError::Record(_)) => {
            assert_eq!(error.code(), "ERR_UFFD_PAGER_LOST");
            error.to_string()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_record_that_cannot_be_trusted_is_refused_by_name_and_its_session_left_alone() {
    let Some(Served { area, bytes, kept, .. }) = orphaned() else { return };
    let record = bytes_of(&kept);
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let waiting = area.part(9, 1).peek();
    let with = |index: usize, value: u64| {
        let damaged = copy_of(&record, &kept);
        put(&damaged.words(), index, value);
        refused(&pager, &damaged)
    };

    assert!(with(0, 0x1234).contains("begins with 0x1234"));
    assert!(with(at::VERSION, 9).contains("version 9"));
    assert!(with(at::BYTES, 4096).contains("checksum"));
    assert!(with(at::SESSION, 12_345).contains("checksum"));
    assert!(with(at::RING, 0x99).contains("message 0 of its ring"));
    assert!(with(at::MAP, 0).contains("more pieces than there was room"));
    assert!(with(at::MAP, 77).contains("checksum of its address map"));
    let short = Kept { record: memfd_of(&record[..8192], true), ..copy_of(&record, &kept) };
    assert!(refused(&pager, &short).contains("8192 bytes"));
    let unsealed = Kept { record: memfd_of(&record, false), ..copy_of(&record, &kept) };
    assert!(refused(&pager, &unsealed).contains("not sealed"));
    let file = Kept { record: tempfile::tempfile().unwrap().into(), ..copy_of(&record, &kept) };
    assert!(refused(&pager, &file).contains("not sealed"));
    let mut other = copy_of(&record, &kept);
    other.session.id += 1;
    assert!(refused(&pager, &other).contains("not of session"));
    // Whose process runs: this one's parent does.
    let words = kept.words();
    let (owner, started) = (get(&words, at::OWNER), get(&words, at::OWNER + 1));
    let parent = nix::unistd::getppid();
    let stat = std::fs::read_to_string(format!("/proc/{parent}/stat")).unwrap();
    put(&words, at::OWNER, parent.as_raw() as u64);
    put(
        &words,
        at::OWNER + 1,
        stat.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap().parse().unwrap(),
    );
    assert!(refused(&pager, &kept).contains("serves its session still"));
    put(&words, at::OWNER, owner);
    put(&words, at::OWNER + 1, started);
    // No userfaultfd at all.
    let not_one = Kept { uffd: tempfile::tempfile().unwrap().into(), ..copy_of(&record, &kept) };
    assert!(matches!(try_resume(&pager, &not_one, PAGES).0, Err(PagerError::NotAdopted(_))));
    // A source that is too short.
    assert!(matches!(try_resume(&pager, &kept, PAGES / 2).0, Err(PagerError::Record(_))));
    drop(pager);

    assert!(waiting.try_recv().is_err(), "it waits as before");
    let resumed = resume(&kept, PAGES);
    assert!(finish(&waiting).unwrap() == page(&bytes, 9));
    let seals = fcntl(&kept.record, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain).unwrap();
    assert!(seals.contains(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW));
    resumed.pager.close_session(resumed.info.id, Rest::Poison);
}

#[test]
fn a_session_is_taken_over_by_a_pager_once() {
    let Some(Served { kept, .. }) = orphaned() else { return };
    let resumed = resume(&kept, PAGES);

    let (outcome, notices) = try_resume(&resumed.pager, &kept, PAGES);

    outcome.unwrap();
    match notices.recv_timeout(DEADLINE).unwrap() {
        Notice::Rejected { error: PagerError::Record(reason), .. } => {
            assert!(reason.contains("by this pager already"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    resumed.pager.close_session(resumed.info.id, Rest::Poison);
    assert_eq!(ended(&resumed.notices, kept.session.id).reason, EndReason::Closed);
}

fn checksum(words: &[u64]) -> u64 {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    u64::from(crc32fast::hash(&bytes)) | 1 << 32
}

/// Changes some words, at places and to values that mean something and to others; and where wanted, makes the checksums right.
fn damage(words: &mut [u64], seed: u64) {
    let mut source = Random::new(seed);
    let mut random = |below: u64| source.next() % below;
    let slot = |words: &[u64]| {
        let bitmap = PAGES.div_ceil(64).next_multiple_of(8);
        at::BITMAPS
            + 2 * bitmap
            + (words[at::MAP] % 2) as usize * (8 + words[5] as usize * 4).next_multiple_of(8)
    };
    let map = slot(words);
    for _ in 0..1 + random(4) {
        let index = match random(5) {
            0 => random(at::STATIC_END as u64) as usize,
            1 => at::STATIC_END + random(80) as usize,
            2 => at::RING + random(at::RING_WORDS as u64) as usize,
            3 => at::BITMAPS + random(16) as usize,
            _ => map + random(24) as usize,
        };
        let old = words[index];
        words[index] = match random(7) {
            0 => 0,
            1 => u64::MAX,
            2 => old ^ 1 << random(64),
            3 => old.wrapping_add(1 << random(20)),
            4 => 0x12 + random(5),
            5 => random(1 << 48) & !0xfff,
            _ => random(u64::MAX >> 21),
        };
    }
    if random(3) > 0 {
        words[at::STATIC_END - 1] = checksum(&words[..at::STATIC_END - 1]);
        let count = (words[map + 4] as usize).min((words.len() - map - 8) / 4);
        words[map] = checksum(&words[map + 1..map + 8 + count * 4]);
    }
}

/// Memory that a session may have left registered because its record knew nothing of it.
fn release(uffd: &uffd::Userfaultfd, area: Area) {
    for part in [area.part(0, 40), area.part(48, PAGES - 48)] {
        let _ = uffd.unregister(part.address, part.len() as u64);
        let _ = uffd.wake(part.address, part.len() as u64);
    }
}

#[test]
fn damaged_records_are_refused_or_served_and_never_end_the_pager() {
    const RECORDS: u64 = 600;
    let Some(Served { area, uffd, kept, .. }) = orphaned() else { return };
    let record = bytes_of(&kept);
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (mut taken, mut not) = (0, 0);
    for seed in 0..RECORDS {
        let mut words: Vec<u64> =
            record.chunks_exact(8).map(|bytes| u64::from_ne_bytes(bytes.try_into().unwrap())).collect();
        damage(&mut words, seed);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let damaged = copy_of(&bytes, &kept);
        let (outcome, notices) = try_resume(&pager, &damaged, PAGES);
        let why = match outcome {
            Ok(()) => {
                let part: Area = area.part(seed as usize % 40, 1);
                let answer = part.peek();
                pager.close_session(kept.session.id, Rest::Poison);
                taken += 1;
                let end = ended(&notices, kept.session.id);
                release(&uffd, area);
                // Bytes, zeros or poison: but an answer.
                let _ = finish(&answer);
                end.error.map(|error| error.to_string()).unwrap_or_default()
            }
            Err(error) => {
                not += 1;
                release(&uffd, area);
                error.to_string()
            }
        };
        assert!(!why.contains("thread failed"), "seed {seed}: {why}");
        area.part(0, 40).discard_here(Made::Private);
        register(&uffd, area.part(0, 40), Modes::MISSING);
    }
    println!("{RECORDS} damaged records: {taken} taken over, {not} refused");
    assert!(taken > RECORDS / 10 && not > RECORDS / 10, "{taken} {not}");
}

#[test]
fn a_session_whose_record_is_damaged_is_poisoned_where_it_was_or_stays_open() {
    // With moves followed, nobody knows where all of its memory is, and there is no process to kill.
    for (features, still_open) in [(uffd::Features::EVENT_REMOVE, false), (all_events(), true)] {
        let Some(Served { area, process, kept, .. }) = served(PAGES, features, Modes::MISSING, |_| {}) else {
            return;
        };
        assert_eq!(area.part(3, 1).read().len(), crate::support::PAGE);
        process.kill();
        put(&kept.words(), 0, 0);
        let waiting = area.part(9, 1).peek();
        let pager = Pager::start(&PagerOptions::default()).unwrap();
        let (observer, notices) = crate::support::told();

        let why = PagerError::Internal("it could not be started again".to_owned());
        pager.fail_session(&kept.session, kept.descriptors(), why, observer).unwrap();

        let end = ended(&notices, kept.session.id);
        assert_eq!(end.reason, EndReason::PagerLost);
        drop(pager);
        let KeptDescriptors { uffd, .. } = kept.descriptors();
        if still_open {
            assert!(end.error.unwrap().to_string().contains("begins with 0x0"));
            assert!(waiting.try_recv().is_err(), "nobody gets zeros");
            // What the test is owed: it would wait for ever.
            let uffd = uffd::Userfaultfd::adopt(uffd.as_fd().try_clone_to_owned().unwrap()).unwrap();
            uffd.unregister(area.address, area.len() as u64).unwrap();
            uffd.wake(area.address, area.len() as u64).unwrap();
            finish(&waiting).unwrap();
        } else {
            assert_eq!(finish(&waiting), Err(nix::errno::Errno::EFAULT), "poisoned");
            assert_eq!(area.part(3, 1).read().len(), crate::support::PAGE, "what is there stays");
        }
    }
}
