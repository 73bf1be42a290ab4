//! The commands where no pager is needed: their arguments, their arithmetic, their refusals. The memory is
//! left to the kernel.

use serde_json::Value;

use crate::support::needs_uffd;
use crate::support::peer::Peer;

/// Two regions that follow each other in the image, the second at the lower address, and one far away.
fn peer() -> Peer {
    let mut peer = Peer::start(&[
        "--no-connect",
        "--no-register",
        "--reverse",
        "--region",
        "64K",
        "--region",
        "32K",
        "--region",
        "16K:1M",
    ]);
    peer.line();
    peer
}

fn pages(answer: &Value) -> u64 {
    answer["pages"].as_u64().unwrap_or_else(|| panic!("{answer}"))
}

#[test]
fn a_refused_command_is_answered_with_the_reason_and_the_next_one_is_obeyed() {
    needs_uffd!();
    let mut peer = peer();
    for (command, named) in [
        ("frobnicate", "unknown command"),
        ("", "unknown command"),
        ("touch order=backwards", "backwards"),
        ("touch colour=red", "colour"),
        ("touch seed", "seed"),
        ("touch threads=0", "threads"),
        ("touch stride=100", "stride"),
        ("hash everything", "everything"),
        ("read 0", "0"),
        ("read 0 65537", "65537"),
        ("read 0 0", "0 bytes"),
        ("read 96K 1", "0x18000"),
        ("read 18446744073709551615 2", "0xffffffffffffffff"),
        ("write 0 abc", "abc"),
        ("discard 100 4096", "0x64"),
        ("discard 0 100", "100"),
        ("discard 92K 8K", "0x18000"),
        ("discard-random", "count"),
        ("probe 512K", "0x80000"),
        ("compare /does/not/exist", "/does/not/exist"),
        ("exit 256", "256"),
    ] {
        let answer = peer.command(command);

        let error = answer["error"].as_str().unwrap_or_else(|| panic!("{command}: {answer}"));
        assert!(error.contains(named), "{command}: {error}");
        assert_eq!(answer["command"], command.split(' ').next().unwrap());
    }
    assert_eq!(pages(&peer.command("resident")), 0);
}

#[test]
fn bytes_written_across_two_regions_are_read_back_in_image_order() {
    needs_uffd!();
    let mut peer = peer();

    let written = peer.command("write 65533 0102030405060708");

    assert_eq!(written["bytes"], 8);
    assert_eq!(peer.command("read 65532 10")["hex"], "00010203040506070800");
}

#[test]
fn touch_with_a_stride_loads_only_every_page_so_far_apart() {
    needs_uffd!();
    let mut peer = peer();

    // 28 pages in image order: every fourth.
    let answer = peer.command("touch stride=16K");

    assert_eq!((pages(&answer), answer["bytes"].as_u64()), (7, Some(7 * 4096)));
    assert_eq!(pages(&peer.command("resident")), 7);
}

#[test]
fn touch_with_a_limit_stops_there() {
    needs_uffd!();
    let mut peer = peer();

    assert_eq!(pages(&peer.command("touch limit=5")), 5);
    assert_eq!(pages(&peer.command("resident")), 5);
}

#[test]
fn touch_in_random_order_is_a_permutation_that_the_seed_decides() {
    needs_uffd!();
    // A page of each run is probed by discarding all others: what is left resident is what was touched.
    let touched = |seed: u32| {
        let mut peer = peer();
        assert_eq!(pages(&peer.command(&format!("touch order=random seed={seed} limit=7"))), 7);
        (0..16)
            .map(|page| {
                let before = pages(&peer.command("resident"));
                peer.command(&format!("discard {} 4096", page * 4096));
                before - pages(&peer.command("resident"))
            })
            .collect::<Vec<_>>()
    };

    assert_eq!(touched(1), touched(1));
    assert_ne!(touched(1), touched(2));
}

#[test]
fn touch_reports_times_that_fit_together() {
    needs_uffd!();
    let mut peer = peer();

    let answer = peer.command("touch order=random");

    let [first, slowest, total] =
        ["first_ns", "max_ns", "total_ns"].map(|name| answer[name].as_u64().unwrap());
    assert!(0 < first && first <= slowest && slowest <= total, "{answer}");
}

#[test]
fn a_discard_across_two_regions_empties_exactly_its_pages() {
    needs_uffd!();
    let mut peer = peer();
    peer.command("touch");

    let answer = peer.command("discard 60K 8K");

    assert!(answer["ns"].as_u64().is_some(), "{answer}");
    assert_eq!(pages(&peer.command("resident")), 26);
    assert_eq!(pages(&peer.command("zeros")), 2);
}

#[test]
fn a_random_discard_counts_the_pages_it_really_emptied() {
    needs_uffd!();
    let mut peer = peer();
    peer.command("touch");

    // Runs of 8 pages in regions of 16, 8 and 4: the last one can only be discarded as a whole.
    let discarded = pages(&peer.command("discard-random count=3 pages=8 seed=5"));

    assert!((4..=24).contains(&discarded), "{discarded}");
    assert_eq!(pages(&peer.command("resident")), 28 - discarded);
    assert_eq!(pages(&peer.command("zeros")), discarded);
}

#[test]
fn a_random_run_longer_than_any_region_discards_one_region_as_a_whole() {
    needs_uffd!();
    let mut peer = peer();

    for seed in 1..=16 {
        let discarded = pages(&peer.command(&format!("discard-random count=1 pages=28 seed={seed}")));

        assert!([16, 8, 4].contains(&discarded), "seed {seed}: {discarded}");
    }
}

#[test]
fn resident_reports_the_process_too() {
    needs_uffd!();
    let mut peer = peer();

    assert!(peer.command("resident")["rss_kib"].as_u64().unwrap() > 0);
}

#[test]
fn a_forked_child_obeys_commands_of_its_own_and_changes_nothing_of_its_parents() {
    needs_uffd!();
    let mut peer = peer();
    peer.command("write 0 01");

    let forked = peer.command("fork");
    assert_ne!(forked["pid"].as_u64(), Some(u64::from(peer.pid())));
    peer.command("write 0 02");
    assert_eq!(peer.command("child read 0 1")["hex"], "01");
    assert_eq!(peer.command("child write 0 03")["bytes"], 1);
    assert_eq!(peer.command("read 0 1")["hex"], "02");
    assert!(peer.command("fork")["error"].as_str().unwrap().contains("already"));
    assert_eq!(peer.command("child fork")["command"], "fork");
    assert_eq!(peer.command("child child read 0 1")["hex"], "03");
    assert_eq!(peer.command("child join")["status"], 0);
    assert_eq!(peer.command("child exit 7")["status"], 7);
    assert!(peer.command("child read 0 1")["error"].as_str().unwrap().contains("the child"));
    assert_eq!(peer.command("join")["status"], 7);
    for command in ["child read 0 1", "join"] {
        assert!(peer.command(command)["error"].as_str().unwrap().contains("no child"));
    }
}
