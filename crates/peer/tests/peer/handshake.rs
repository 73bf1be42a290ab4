//! What is sent, byte for byte and descriptor for descriptor, and what the process's memory looks like then.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use serde_json::Value;

use crate::support::needs_uffd;
use crate::support::receiver::Receiver;

fn base(ready: &Value, index: usize) -> u64 {
    let text = ready["regions"][index]["base"].as_str().unwrap();
    u64::from_str_radix(text.strip_prefix("0x").unwrap(), 16).unwrap()
}

/// What the descriptor is, as /proc names it.
fn kind(descriptor: &OwnedFd) -> String {
    let link = fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd())).unwrap();
    link.to_str().unwrap().to_owned()
}

const USERFAULTFD: &str = "anon_inode:[userfaultfd]";

/// The value behind `name` in the descriptor's fdinfo.
fn info(descriptor: &OwnedFd, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd())).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value.unwrap_or_else(|| panic!("no {name} in {text}")).trim().to_owned()
}

fn is_nonblocking(descriptor: &OwnedFd) -> bool {
    // SAFETY: F_GETFL takes no memory.
    let flags = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_GETFL) };
    flags & libc::O_NONBLOCK != 0
}

/// The (address range, permissions, flags) of every mapping of the process.
fn mappings(pid: u32) -> Vec<(u64, u64, String, String)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut found: Vec<(u64, u64, String, String)> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            found.last_mut().unwrap().3 = flags.trim().to_owned();
        } else if let Some((start, end)) = first.split_once('-') {
            let address = |text| u64::from_str_radix(text, 16).unwrap();
            found.push((address(start), address(end), words.next().unwrap().to_owned(), String::new()));
        }
    }
    found
}

#[test]
fn the_ready_line_describes_the_regions_and_finds_nothing_resident() {
    needs_uffd!();
    let receiver = Receiver::new();

    let (peer, ready, _connection) = receiver.peer(&["--region", "64K", "--region", "8K:1M"]);

    assert_eq!(ready["event"], "ready");
    assert_eq!(ready["pid"], peer.pid());
    assert_eq!(ready["resident"], 0);
    let regions = ready["regions"].as_array().unwrap();
    let members = ["size", "offset", "page_size"];
    let numbers: Vec<_> =
        regions.iter().map(|region| members.map(|name| region[name].as_u64().unwrap())).collect();
    assert_eq!(numbers, [[65536, 0, 4096], [8192, 1 << 20, 4096]]);
}

#[test]
fn each_version_sends_its_own_members_in_its_own_order() {
    needs_uffd!();
    let receiver = Receiver::new();
    for (version, members) in [
        ("v1.1", ""),
        ("v1.7", r#","page_size_kib":4096"#),
        ("v1.12", r#","page_size":4096,"page_size_kib":4096"#),
    ] {
        let (_peer, ready, connection) =
            receiver.peer(&["--region", "1M", "--region", "8K", "--fields", version]);
        let message = connection.message();

        let (first, second) = (base(&ready, 0), base(&ready, 1));
        let expected = format!(
            r#"[{{"base_host_virt_addr":{first},"size":1048576,"offset":0{members}}},{{"base_host_virt_addr":{second},"size":8192,"offset":1048576{members}}}]"#
        );
        assert_eq!(String::from_utf8(message.bytes).unwrap(), expected, "{version}");
        assert_eq!(message.descriptors.iter().map(kind).collect::<Vec<_>>(), [USERFAULTFD]);
    }
}

#[test]
fn without_a_version_the_members_are_those_of_the_newest() {
    needs_uffd!();
    let receiver = Receiver::new();

    let (_peer, ready, connection) = receiver.peer(&["--region", "4K"]);

    let expected = format!(
        r#"[{{"base_host_virt_addr":{},"size":4096,"offset":0,"page_size":4096,"page_size_kib":4096}}]"#,
        base(&ready, 0)
    );
    assert_eq!(String::from_utf8(connection.message().bytes).unwrap(), expected);
}

#[test]
fn an_extra_field_is_one_unknown_member_in_every_region() {
    needs_uffd!();
    let receiver = Receiver::new();

    let (_peer, _ready, connection) =
        receiver.peer(&["--region", "4K", "--region", "4K", "--fields", "v1.1", "--extra-field"]);

    let json: Value = serde_json::from_slice(&connection.message().bytes).unwrap();
    for region in json.as_array().unwrap() {
        let mut names: Vec<&str> = region.as_object().unwrap().keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["base_host_virt_addr", "offset", "size", "unknown_to_all_versions"]);
    }
}

#[test]
fn reversed_regions_descend_in_address_and_keep_their_order_otherwise() {
    needs_uffd!();
    let receiver = Receiver::new();

    let (_peer, ready, connection) = receiver.peer(&["--region", "8K", "--region", "16K", "--reverse"]);

    let json: Value = serde_json::from_slice(&connection.message().bytes).unwrap();
    assert_eq!((json[0]["size"].as_u64(), json[1]["size"].as_u64()), (Some(8192), Some(16384)));
    assert_eq!((json[0]["offset"].as_u64(), json[1]["offset"].as_u64()), (Some(0), Some(8192)));
    // Behind the second region a page of nothing, then the first.
    assert_eq!(base(&ready, 0), base(&ready, 1) + 16384 + 4096);
}

#[test]
fn exactly_the_regions_are_registered_and_nothing_accessible_touches_them() {
    needs_uffd!();
    let receiver = Receiver::new();

    let (peer, ready, _connection) = receiver.peer(&["--region", "8K", "--region", "16K"]);

    let expected = [(base(&ready, 0), 8192), (base(&ready, 1), 16384)].map(|(at, size)| (at, at + size));
    let all = mappings(peer.pid());
    let registered: Vec<_> =
        all.iter().filter(|mapping| mapping.3.split(' ').any(|flag| flag == "um")).collect();
    assert_eq!(registered.iter().map(|mapping| (mapping.0, mapping.1)).collect::<Vec<_>>(), expected);
    for (start, end) in expected {
        let neighbours: Vec<&str> = all
            .iter()
            .filter(|mapping| mapping.1 == start || mapping.0 == end)
            .map(|mapping| mapping.2.as_str())
            .collect();
        assert_eq!(neighbours, ["---p", "---p"]);
    }
}

#[test]
fn no_register_leaves_the_memory_to_the_kernel() {
    needs_uffd!();
    let receiver = Receiver::new();

    let (mut peer, _ready, _connection) = receiver.peer(&["--region", "8K", "--no-register"]);

    assert_eq!(peer.command("touch")["pages"], 2);
}

#[test]
fn pieces_arrive_apart_and_the_descriptor_with_its_piece() {
    needs_uffd!();
    let receiver = Receiver::new();

    let (mut peer, ready, connection) =
        receiver.peer(&["--region", "4K", "--fields", "v1.1", "--pieces", "5", "--fd-piece", "2"]);
    let messages: Vec<_> = (0..5).map(|_| connection.message()).collect();

    assert_eq!(messages.iter().map(|message| message.descriptors.len()).collect::<Vec<_>>(), [0, 0, 1, 0, 0]);
    let text = messages.iter().flat_map(|message| message.bytes.clone()).collect();
    let expected = format!(r#"[{{"base_host_virt_addr":{},"size":4096,"offset":0}}]"#, base(&ready, 0));
    assert_eq!(String::from_utf8(text).unwrap(), expected);
    // An answer shows that the handshake is over: no piece is missing.
    peer.command("resident");
    assert!(connection.is_quiet());
}

#[test]
fn a_given_text_is_sent_as_it_is_with_the_real_numbers_in_it() {
    needs_uffd!();
    let receiver = Receiver::new();
    let template = r#"{"b":{base1},"s":{size1},"o":{offset1},"x":{base7},"y":{}} "#;

    let (_peer, ready, connection) =
        receiver.peer(&["--region", "4K", "--region", "8K", "--json", template, "--trailing", "[]\n"]);

    let expected =
        format!(r#"{{"b":{},"s":8192,"o":4096,"x":{{base7}},"y":{{}}}} []"#, base(&ready, 1)) + "\n";
    assert_eq!(String::from_utf8(connection.message().bytes).unwrap(), expected);
}

#[test]
fn each_kind_of_descriptor_is_what_its_name_says() {
    needs_uffd!();
    let receiver = Receiver::new();
    for (name, expected) in [
        ("uffd", &[USERFAULTFD][..]),
        ("none", &[]),
        ("null", &["/dev/null"]),
        ("blocking", &[USERFAULTFD]),
        ("no-api", &[USERFAULTFD]),
        ("two", &[USERFAULTFD, "/dev/null"]),
    ] {
        let (_peer, _ready, connection) = receiver.peer(&["--region", "4K", "--fd", name]);

        let kinds: Vec<String> = connection.message().descriptors.iter().map(kind).collect();
        assert_eq!(kinds, expected, "{name}");
    }
}

#[test]
fn a_sent_pipe_is_the_reading_end_and_its_writer_stays_open() {
    needs_uffd!();
    let receiver = Receiver::new();
    let (mut peer, _ready, connection) = receiver.peer(&["--region", "4K", "--fd", "pipe"]);
    let pipe = connection.message().descriptors.remove(0);
    peer.command("resident");

    let mut polled = libc::pollfd { fd: pipe.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which lives across the call.
    let ready = unsafe { libc::poll(&raw mut polled, 1, 0) };

    assert!(kind(&pipe).starts_with("pipe:"));
    assert_eq!((ready, polled.revents), (0, 0));
}

#[test]
fn the_userfaultfd_is_nonblocking_and_asks_for_remove_events_alone() {
    needs_uffd!();
    let receiver = Receiver::new();

    let (_peer, _ready, connection) = receiver.peer(&["--region", "4K"]);

    let uffd = connection.message().descriptors.remove(0);
    assert!(is_nonblocking(&uffd));
    // Bit 31 is the kernel's mark of a finished handshake.
    assert!(info(&uffd, "API:").starts_with("aa:80000008:"), "{}", info(&uffd, "API:"));
}

#[test]
fn a_blocking_userfaultfd_was_created_that_way() {
    needs_uffd!();
    let receiver = Receiver::new();

    let (_peer, _ready, connection) = receiver.peer(&["--region", "4K", "--fd", "blocking"]);

    assert!(!is_nonblocking(&connection.message().descriptors[0]));
}

#[test]
fn a_userfaultfd_without_its_handshake_shows_no_features() {
    needs_uffd!();
    let receiver = Receiver::new();

    let (_peer, _ready, connection) = receiver.peer(&["--region", "4K", "--fd", "no-api"]);

    let uffd = connection.message().descriptors.remove(0);
    assert!(info(&uffd, "API:").starts_with("aa:0:"), "{}", info(&uffd, "API:"));
}

#[test]
fn features_and_the_syscall_can_be_chosen() {
    needs_uffd!();
    let receiver = Receiver::new();

    let (_peer, _ready, connection) =
        receiver.peer(&["--region", "4K", "--features", "0x48", "--syscall", "--user-mode-only"]);

    let uffd = connection.message().descriptors.remove(0);
    assert!(info(&uffd, "API:").starts_with("aa:80000048:"), "{}", info(&uffd, "API:"));
}

#[test]
fn a_kept_connection_stays_open_and_silent() {
    needs_uffd!();
    let receiver = Receiver::new();
    let (mut peer, _ready, connection) = receiver.peer(&["--region", "4K"]);
    connection.message();

    peer.command("resident");

    assert!(connection.is_quiet());
}

#[test]
fn a_closed_connection_still_delivers_the_whole_handshake() {
    needs_uffd!();
    let receiver = Receiver::new();
    let (mut peer, _ready, connection) = receiver.peer(&["--region", "4K", "--close"]);
    peer.command("resident");

    let (message, end) = (connection.message(), connection.message());

    assert!(message.bytes.ends_with(b"}]"));
    assert_eq!(message.descriptors.len(), 1);
    assert!(end.bytes.is_empty());
}

#[test]
fn a_peer_that_hangs_up_sends_so_many_bytes_and_no_more() {
    needs_uffd!();
    let receiver = Receiver::new();
    for (arguments, lens, descriptors) in [
        (&["--hang-up-after", "10"][..], &[10, 0][..], &[1, 0][..]),
        (&["--hang-up-after", "0"], &[0], &[0]),
        // 20 bytes in 4 messages: two of them, the second cut short, and never the one with the descriptor.
        (
            &["--json", "12345678901234567890", "--pieces", "4", "--fd-piece", "2", "--hang-up-after", "7"],
            &[5, 2, 0],
            &[0, 0, 0],
        ),
    ] {
        let (_peer, _ready, connection) = receiver.peer(&[&["--region", "4K"], arguments].concat());

        let messages: Vec<_> = lens.iter().map(|_| connection.message()).collect();
        assert_eq!(messages.iter().map(|message| message.bytes.len()).collect::<Vec<_>>(), lens);
        assert_eq!(messages.iter().map(|message| message.descriptors.len()).collect::<Vec<_>>(), descriptors);
    }
}

#[test]
fn a_receiver_that_goes_away_between_pieces_is_status_2() {
    needs_uffd!();
    let receiver = Receiver::new();
    let (mut peer, _ready, connection) = receiver.peer(&["--region", "4K", "--pieces", "3"]);

    connection.message();
    drop(connection);

    assert_eq!(peer.status().code(), Some(2));
    assert!(peer.complaint().contains("sendmsg"));
}

#[test]
fn with_a_memfd_both_descriptors_come_together_and_the_regions_lie_in_it_one_behind_the_other() {
    needs_uffd!();
    let receiver = Receiver::new();
    // MINOR_SHMEM alone: nobody reads events.
    let (mut peer, ready, connection) = receiver.peer(&[
        "--region",
        "8K:64K",
        "--region",
        "4K:0",
        "--memfd",
        "--modes",
        "minor",
        "--features",
        "400",
        "--fd",
        "memfd",
    ]);

    let [uffd, memfd] = <[OwnedFd; 2]>::try_from(connection.message().descriptors).unwrap();

    assert_eq!(kind(&uffd), USERFAULTFD);
    assert!(kind(&memfd).starts_with("/memfd:peer"));
    let memfd = fs::File::from(memfd);
    assert_eq!(memfd.metadata().unwrap().len(), 3 * 4096);
    // Registered for minor faults alone: the kernel fills holes.
    let second_page = || {
        let mut byte = [0];
        memfd.read_exact_at(&mut byte, 4096).unwrap();
        byte[0]
    };
    assert_eq!(peer.command("write 69632 02")["bytes"], 1);
    assert_eq!(second_page(), 2);
    let modes: Vec<_> = mappings(peer.pid())
        .into_iter()
        .filter(|mapping| [base(&ready, 0), base(&ready, 1)].contains(&mapping.0))
        .map(|mapping| (mapping.2, mapping.3.contains("ui")))
        .collect();
    assert_eq!(modes, [("rw-s".to_owned(), true), ("rw-s".to_owned(), true)]);
    peer.command("discard 69632 4096");
    assert_eq!(second_page(), 0);
}
