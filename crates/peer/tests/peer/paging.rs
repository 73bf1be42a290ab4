//! The peer with its memory filled by a pager: that every load is a real fault, that the bytes arrive, and
//! that each check notices a pager that is wrong.

use std::fs;
use std::os::unix::process::ExitStatusExt;

use tempfile::NamedTempFile;

use crate::support::pager::{Pager, Plan};
use crate::support::peer::Peer;
use crate::support::receiver::{Connection, Receiver};
use crate::support::{PAGE, Pool, image, needs_uffd, sha256};

const PAGES: usize = 64;

/// Regions in neither image nor address order that together hold the whole image of [`PAGES`] pages.
const REGIONS: [&str; 7] =
    ["--region", "64K:128K", "--region", "128K:0", "--region", "64K:192K", "--reverse"];

/// A peer whose faults are answered. The connection and the receiver live as long.
struct Served {
    peer: Peer,
    pager: Pager,
    _connection: Connection,
    _receiver: Receiver,
}

fn served(plan: Plan, more: &[&str]) -> Served {
    served_regions(plan, &[&REGIONS, more].concat())
}

fn served_regions(plan: Plan, arguments: &[&str]) -> Served {
    let receiver = Receiver::new();
    let (peer, _ready, connection) = receiver.peer(arguments);
    let pager = Pager::serve(&connection, plan);
    Served { peer, pager, _connection: connection, _receiver: receiver }
}

fn plan() -> Plan {
    Plan { image: image(PAGES), ..Plan::default() }
}

#[test]
fn touch_takes_one_fault_a_page() {
    needs_uffd!();
    let mut served = served(plan(), &[]);

    let answer = served.peer.command("touch order=random seed=3");

    assert_eq!(answer["pages"], PAGES);
    assert_eq!(answer["bytes"], PAGES * PAGE);
    assert_eq!(served.pager.stop(), PAGES as u64);
    assert_eq!(served.peer.command("resident")["pages"], PAGES);
}

#[test]
fn touch_with_threads_splits_the_pages_among_them() {
    needs_uffd!();
    let mut served = served(plan(), &[]);

    let answer = served.peer.command("touch order=random threads=5");

    assert_eq!(answer["pages"], PAGES);
    assert_eq!(served.pager.stop(), PAGES as u64);
}

#[test]
fn the_hash_is_that_of_the_image() {
    needs_uffd!();
    let plan = plan();
    let expected = sha256(&plan.image);
    let mut served = served(plan, &[]);

    let answer = served.peer.command("hash");

    assert_eq!(answer["sha256"], expected);
    assert_eq!(answer["bytes"], PAGES * PAGE);
}

#[test]
fn a_read_is_of_the_image_whatever_the_addresses() {
    needs_uffd!();
    let plan = plan();
    // Across the border of two regions.
    let expected: String = plan.image[131_068..131_076].iter().map(|byte| format!("{byte:02x}")).collect();
    let mut served = served(plan, &[]);

    assert_eq!(served.peer.command("read 131068 8")["hex"], expected);
}

#[test]
fn discarded_pages_read_zero_and_the_rest_stays_the_image() {
    needs_uffd!();
    let plan = plan();
    let rest: Vec<u8> = [&plan.image[..124 * 1024], &plan.image[136 * 1024..]].concat();
    let mut served = served(plan, &[]);
    served.peer.command("touch");

    served.peer.command("discard 124K 12K");

    let zeros = served.peer.command("zeros");
    assert_eq!((&zeros["pages"], &zeros["nonzero"]), (&3.into(), &0.into()));
    assert!(zeros["first_bad"].is_null());
    let hash = served.peer.command("hash skip-discarded");
    assert_eq!(hash["sha256"], sha256(&rest));
    assert_eq!(hash["bytes"], rest.len());
}

#[test]
fn random_discards_read_zero() {
    needs_uffd!();
    let mut served = served(plan(), &[]);
    served.peer.command("touch");

    let discarded = served.peer.command("discard-random seed=9 count=10 pages=3");

    let zeros = served.peer.command("zeros");
    assert_eq!(zeros["pages"], discarded["pages"]);
    assert_eq!(zeros["nonzero"], 0);
}

#[test]
fn zeros_finds_a_pager_that_forgets_removals() {
    needs_uffd!();
    let mut served = served(Plan { forget_removals: true, ..plan() }, &[]);
    served.peer.command("touch");
    served.peer.command("discard 192K 8K");

    let zeros = served.peer.command("zeros");

    assert_eq!((&zeros["pages"], &zeros["nonzero"]), (&2.into(), &2.into()));
    assert_eq!(zeros["first_bad"], 192 * 1024);
}

#[test]
fn compare_finds_no_difference_beyond_the_discarded_pages() {
    needs_uffd!();
    let plan = plan();
    let file = NamedTempFile::new().unwrap();
    fs::write(&file, &plan.image).unwrap();
    let mut served = served(plan, &[]);
    served.peer.command("discard 0 4096");

    let answer = served.peer.command(&format!("compare {}", file.path().display()));

    assert_eq!((&answer["pages"], &answer["different"]), (&(PAGES - 1).into(), &0.into()));
    assert!(answer["first_bad"].is_null());
}

#[test]
fn compare_finds_the_byte_that_differs() {
    needs_uffd!();
    let plan = plan();
    let file = NamedTempFile::new().unwrap();
    let mut other = plan.image.clone();
    other[140_001] ^= 1;
    fs::write(&file, &other).unwrap();
    let mut served = served(plan, &[]);

    let answer = served.peer.command(&format!("compare {}", file.path().display()));

    assert_eq!((&answer["different"], &answer["first_bad"]), (&1.into(), &140_001.into()));
}

#[test]
fn compare_with_a_file_that_ends_early_is_an_error() {
    needs_uffd!();
    let plan = plan();
    let file = NamedTempFile::new().unwrap();
    fs::write(&file, &plan.image[..200_000]).unwrap();
    let mut served = served(plan, &[]);

    let answer = served.peer.command(&format!("compare {}", file.path().display()));

    assert!(answer["error"].as_str().unwrap().contains("0x30000"), "{answer}");
}

#[test]
fn a_probe_of_a_missing_page_is_a_fault_and_gives_its_bytes() {
    needs_uffd!();
    let plan = plan();
    let expected: String = plan.image[8192..8200].iter().map(|byte| format!("{byte:02x}")).collect();
    let mut served = served(plan, &[]);

    let answer = served.peer.command("probe 9000");

    assert_eq!((answer["result"].as_str(), answer["hex"].as_str()), (Some("ok"), Some(expected.as_str())));
    assert_eq!(served.pager.stop(), 1);
}

#[test]
fn a_probe_of_a_poisoned_page_is_efault_and_the_peer_lives_on() {
    needs_uffd!();
    let mut served = served(Plan { poison: Some(8192), ..plan() }, &[]);

    let answer = served.peer.command("probe 8192");

    assert_eq!(answer["result"], "efault");
    assert_eq!(served.peer.command("probe 4096")["result"], "ok");
}

#[test]
fn a_load_of_a_poisoned_page_kills_the_peer_by_sigbus() {
    needs_uffd!();
    let mut served = served(Plan { poison: Some(8192), ..plan() }, &[]);

    served.peer.send("touch");

    assert_eq!(served.peer.status().signal(), Some(libc::SIGBUS));
}

#[test]
fn a_poisoned_page_kills_all_threads_of_a_touch() {
    needs_uffd!();
    let mut served = served(Plan { poison: Some(8192), ..plan() }, &[]);

    served.peer.send("touch threads=4");

    assert_eq!(served.peer.status().signal(), Some(libc::SIGBUS));
}

#[test]
fn in_user_mode_only_a_probe_does_not_fault_but_a_load_does() {
    needs_uffd!();
    let mut served = served(plan(), &["--user-mode-only"]);

    assert_eq!(served.peer.command("probe 0")["result"], "efault");
    assert_eq!(served.peer.command("touch limit=1")["pages"], 1);
    assert_eq!(served.peer.command("probe 0")["result"], "ok");
    assert_eq!(served.pager.stop(), 1);
}

#[test]
fn huge_pages_are_touched_hashed_and_discarded_as_such() {
    needs_uffd!();
    // Two of image, and one that a discarded page comes back to.
    let Some(_pool) = Pool::with(3) else { return };
    let huge = 2 << 20;
    let plan = Plan { image: image(2 * huge / PAGE), ..Plan::default() };
    let expected = sha256(&plan.image);
    let mut served = served_regions(plan, &["--region", "4M", "--page-size", "2097152"]);

    assert_eq!(served.peer.command("touch")["pages"], 2);
    assert_eq!(served.peer.command("hash")["sha256"], expected);
    served.peer.command("discard 2M 2M");

    assert_eq!(served.peer.command("resident")["pages"], 1);
    assert_eq!(served.peer.command("zeros")["nonzero"], 0);
}
