//! What a peer can send instead of a handshake: mutated messages, by a deterministic mutator, against the parser and the
//! address map, and a few thousand of them over a socket against a server.
//!
//! `USERFAULTFD_FUZZ_ROUNDS` says how many (default: 100 000).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

#[path = "support/handshakes.rs"]
mod handshakes;
mod support;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pager::{
    AddressMap, EndReason, Handshake, Images, Listener, Notice, Pager, PagerError, PagerOptions, Region,
    Rest, ServerOptions, parse_handshake,
};
use serde_json::Value;
use uffd::fd_passing::send_all;
use uffd::{Mapping, MappingKind, Modes};

use handshakes::{Bounds, Random, message, pieces};
use support::{Bytes, DEADLINE, PAGE, image, told};

/// As the parser's: what is behind it is not looked at.
const LONGEST: usize = 64 << 10;

fn rounds(default: usize) -> usize {
    std::env::var("USERFAULTFD_FUZZ_ROUNDS")
        .map_or(default, |rounds| rounds.parse().expect("a number of messages"))
}

/// What the array of a message says, read in another way: by number, field and region.
fn said(bytes: &[u8]) -> Option<Handshake> {
    let array = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>().next()?.ok()?;
    let number = |region: &Value, name: &str| region.get(name).and_then(Value::as_u64);
    let regions: Option<Vec<Region>> = array
        .as_array()?
        .iter()
        .map(|region| {
            Some(Region {
                address: number(region, "base_host_virt_addr")?,
                len: number(region, "size")?,
                source_offset: number(region, "offset")?,
            })
        })
        .collect();
    let sizes = array.as_array()?.iter().map(|region| {
        number(region, "page_size").or_else(|| number(region, "page_size_kib")).unwrap_or(PAGE as u64)
    });
    let page_size = sizes.max().unwrap_or(PAGE as u64);
    Some(Handshake { regions: regions?, page_size })
}

/// As Firecracker of today would say the same.
fn told_again(handshake: &Handshake) -> String {
    let regions: Vec<Value> = handshake
        .regions
        .iter()
        .map(|region| {
            serde_json::json!({
                "base_host_virt_addr": region.address, "size": region.len, "offset": region.source_offset,
                "page_size": handshake.page_size, "page_size_kib": handshake.page_size,
            })
        })
        .collect();
    serde_json::to_string(&regions).unwrap()
}

/// Whether a process may be given this memory from a source of that length; in numbers that do not overflow.
fn acceptable(Handshake { regions, page_size }: &Handshake, source: u64) -> bool {
    let wide = |number: u64| u128::from(number);
    let apart = |one: &Region, other: &Region| {
        wide(one.address) + wide(one.len) <= wide(other.address)
            || wide(other.address) + wide(other.len) <= wide(one.address)
    };
    let good = |(index, region): (usize, &Region)| {
        let Region { address, len, source_offset } = *region;
        len > 0
            && [address, len, source_offset].iter().all(|number| number % page_size == 0)
            && wide(address) + wide(len) <= 1 << 56
            && wide(source_offset) + wide(len) <= wide(source)
            && regions[..index].iter().all(|other| apart(region, other))
    };
    !regions.is_empty()
        && regions.iter().map(|region| wide(region.len)).sum::<u128>() <= wide(source)
        && regions.iter().enumerate().all(good)
}

/// Every page of a map is where the regions say, and nothing else is in it.
fn check_map(map: &AddressMap, handshake: &Handshake) {
    let mut pages = 0;
    for region in &handshake.regions {
        let (first, last) = (region.address, region.address + region.len - 1);
        for address in [first, last] {
            let page = map.page_of(address).unwrap();
            let within = address / handshake.page_size * handshake.page_size - first;
            assert_eq!(map.address_of(page), Some(first + within));
            assert_eq!(map.source_offset_of(page), Some(region.source_offset + within));
        }
        pages += region.len / handshake.page_size;
    }
    assert_eq!(map.pages() as u64, pages);
    assert_eq!(map.address_of(map.pages()), None);
    assert_eq!(map.page_of(map.regions().next().unwrap().address.wrapping_sub(1)), None);
}

/// What became of a message, checked against everything that has to hold.
fn judge(random: &mut Random) -> &'static str {
    let bounds = Bounds::anywhere(random);
    let message = message(random, bounds);
    let base = PAGE as u64;
    let mut before: Option<Result<Handshake, String>> = None;
    let mut outcome = Ok(None);
    for end in pieces(random, message.bytes.len()) {
        outcome = parse_handshake(&message.bytes[..end], base);
        let settled = match &outcome {
            Ok(None) => None,
            Ok(Some(handshake)) => Some(Ok(handshake.clone())),
            Err(error) => Some(Err(error.code().to_owned())),
        };
        // What is behind a message cannot change what it says, nor make sense of what made none. (`[22` is wrong at
        // once; of `[22e` the reader wants to see the end of the number first.)
        let refused = matches!(before, Some(Err(_))) && settled.is_none();
        assert!(
            before.is_none() || before == settled || refused,
            "{end} bytes: first {before:?}, then {settled:?}"
        );
        before = settled.or(before);
    }
    match outcome {
        Ok(None) => {
            assert!(message.mutated && message.bytes.len() < LONGEST, "incomplete for ever");
            "incomplete"
        }
        Err(error) => {
            assert!(message.mutated, "{error}");
            match error {
                PagerError::Protocol(_) => "no handshake",
                PagerError::Unsupported(_) => "page size",
                other => panic!("{other}"),
            }
        }
        Ok(Some(handshake)) => {
            let head = &message.bytes[..message.bytes.len().min(LONGEST)];
            // A whole JSON reader minds what is in fields that mean nothing here, such as half a character.
            assert!(said(head).is_none_or(|said| said == handshake), "{handshake:?}");
            assert_eq!(
                parse_handshake(told_again(&handshake).as_bytes(), base).unwrap().as_ref(),
                Some(&handshake)
            );
            let good = acceptable(&handshake, bounds.len);
            assert!(good || message.mutated);
            match AddressMap::new(&handshake.regions, handshake.page_size, bounds.len) {
                Ok(map) => {
                    assert!(good, "accepted");
                    check_map(&map, &handshake);
                    if message.mutated { "accepted, mutated" } else { "accepted" }
                }
                Err(error) => {
                    assert!(!good, "refused: {error}");
                    assert!(matches!(error, PagerError::Region { .. } | PagerError::Protocol(_)), "{error}");
                    "regions"
                }
            }
        }
    }
}

#[test]
fn mutated_handshakes_are_accepted_only_where_every_number_is_right() {
    let (rounds, start) = (rounds(100_000), Instant::now());
    let mut outcomes = BTreeMap::<_, usize>::new();
    for round in 0..rounds {
        let judged = std::panic::catch_unwind(|| judge(&mut Random::new(round as u64 + 1)));
        let Ok(outcome) = judged else {
            let mut random = Random::new(round as u64 + 1);
            let bounds = Bounds::anywhere(&mut random);
            let bytes = message(&mut random, bounds).bytes;
            panic!("round {round}: {}", String::from_utf8_lossy(&bytes));
        };
        *outcomes.entry(outcome).or_default() += 1;
    }
    println!("{rounds} messages in {} ms: {outcomes:?}", start.elapsed().as_millis());
    // A mutator that only makes rubbish, or none, tests nothing.
    for kind in ["accepted", "accepted, mutated", "incomplete", "no handshake", "page size", "regions"] {
        let count = outcomes.get(kind).copied().unwrap_or(0);
        assert!(count * 100 >= rounds, "{kind}: {count} of {rounds}");
    }
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Threads of pagers.
fn threads() -> usize {
    let names = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    names.filter(|name| name.starts_with("uffd-")).count()
}

#[test]
fn a_server_survives_mutated_handshakes_and_keeps_nothing_of_them() {
    const PAGES: usize = 16;
    let bytes = image(PAGES);
    let mapping = Arc::new(Mapping::new(PAGES * PAGE, MappingKind::Private).unwrap());
    // Closed before the mapping goes: unmapping waits until its event was read.
    let Some(uffd) = support::uffd() else { return };
    // SAFETY: no reference to the mapping exists; it is read by copying.
    unsafe { uffd.register(mapping.address(), mapping.len() as u64, Modes::MISSING) }.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let before = (open_files(), threads());
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let (observer, notices) = told();
    let options = ServerOptions {
        handshake_timeout: Duration::from_secs(60),
        max_sessions: 8,
        ..ServerOptions::new(Images::One(Arc::new(Bytes(bytes.clone()))))
    };
    let path = dir.path().join("s");
    pager.serve_firecracker(Listener::bind(&path, None).unwrap(), options, observer);
    // Who hands memory over and is turned away meets the failure policy, which this process would not survive: what is not
    // acceptable comes with a descriptor that is no userfaultfd.
    let other = std::fs::File::open("/dev/null").unwrap();
    let serving = (open_files(), threads());

    let (mut started, mut rejected) = (0, 0);
    for round in 0..rounds(100_000) / 50 {
        let mut random = Random::new((1 << 40) + round as u64);
        let bounds = Bounds { address: mapping.address(), len: mapping.len() as u64, page_size: PAGE as u64 };
        let message = message(&mut random, bounds);
        let good = parse_handshake(&message.bytes, PAGE as u64)
            .ok()
            .flatten()
            .is_some_and(|handshake| acceptable(&handshake, bounds.len));
        let client = UnixStream::connect(&path).unwrap();
        let with_uffd = !random.one_in(16);
        let mut start = 0;
        for end in pieces(&mut random, message.bytes.len()) {
            let fds = [if good && !message.mutated { uffd.as_fd() } else { other.as_fd() }];
            let riding = if with_uffd && start == 0 { &fds[..] } else { &[] };
            if start < end && send_all(client.as_fd(), &message.bytes[start..end], riding, DEADLINE).is_err()
            {
                // Turned away before the end.
                break;
            }
            start = end;
        }
        client.shutdown(std::net::Shutdown::Write).unwrap_or(());

        match notices.recv_timeout(DEADLINE).unwrap() {
            Notice::SessionStarted(info) => {
                assert!(good && with_uffd, "round {round}: {}", String::from_utf8_lossy(&message.bytes));
                started += 1;
                if !message.mutated && started % 64 == 1 {
                    let region = info.regions[0];
                    let offset = (region.address - mapping.address()) as usize;
                    let source = region.source_offset as usize;
                    if offset < mapping.len() {
                        assert!(
                            support::read(&mapping, offset, PAGE) == bytes[source..source + PAGE],
                            "round {round}: not the source's bytes"
                        );
                    }
                }
                pager.close_session(info.id, Rest::Zero);
                match notices.recv_timeout(DEADLINE).unwrap() {
                    Notice::SessionEnded { end, .. } => assert_eq!(end.reason, EndReason::Closed),
                    other => panic!("round {round}: {other:?}"),
                }
                // Closing gave the memory back to the kernel, and its pages are there now.
                // SAFETY: as above.
                unsafe { uffd.register(mapping.address(), mapping.len() as u64, Modes::MISSING) }.unwrap();
            }
            Notice::Rejected { error, .. } => {
                assert!(message.mutated || !with_uffd, "round {round}: {error}");
                rejected += 1;
            }
            other => panic!("round {round}: {other:?}"),
        }
        drop(client);
        if round % 256 == 255 {
            assert_eq!((open_files(), threads()), serving, "round {round}");
        }
    }
    println!("{started} sessions, {rejected} turned away");
    assert!(started > 50 && rejected > 50);
    assert_eq!((open_files(), threads()), serving);

    drop((pager, other));
    assert_eq!((open_files(), threads()), before);
}
