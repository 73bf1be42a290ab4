//! The store of a service manager: what the holder keeps outlives the holder, and whoever died with it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::client::Client;
use support::guest::{self, Guest};
use support::service::is_alive;
use support::stage::{OF_A_SESSION, Stage, daemon_of, stopped};
use support::until;

/// Not a test: the process that the others have served.
#[test]
fn a_guest() {
    guest::run_if_asked();
}

#[test]
fn everything_is_killed_while_faults_wait_and_goes_on_with_what_was_stored() {
    // What a manager sends to those who are left: SIGKILL with KillMode=mixed, SIGTERM with KillMode=control-group.
    for others in [Signal::SIGKILL, Signal::SIGTERM] {
        let stage = Stage::new(100);
        let service = stage.manager.started();
        let mut guest = stage.guest(json!({}));
        guest.reads(1);
        guest.has_read(1);
        let daemon = stopped(&service);
        guest.reads(2);
        let [uffd, ..] = stage.parts();
        until("a fault waits", || stage.manager.store().info(&uffd).contains("pending:\t1"));
        if others == Signal::SIGTERM {
            kill(Pid::from_raw(daemon), Signal::SIGCONT).unwrap();
            guest.has_read(2);
        }

        service.killed(others);
        // Nobody is there.
        guest.reads(3);
        until("another waits", || {
            let waits = if others == Signal::SIGTERM { "pending:\t1" } else { "pending:\t2" };
            stage.manager.store().info(&uffd).contains(waits)
        });
        let _service = stage.manager.started();

        if others == Signal::SIGKILL {
            // In whichever order they are answered.
            until("both were answered", || stage.manager.store().info(&uffd).contains("total:\t0"));
            let mut read = [guest.says(), guest.says()];
            read.sort();
            assert_eq!(read, ["read 2", "read 3"]);
        } else {
            guest.has_read(3);
        }
        stage.serves(&[guest.session]);
        assert_eq!(guest.hash(), stage.hash);
    }
}

#[test]
fn sessions_that_begin_later_have_numbers_of_their_own_and_a_second_death_is_survived_too() {
    let stage = Stage::new(100);
    let mut guests = Vec::new();
    for round in 0..3 {
        let service = stage.manager.started();
        guests.push(stage.guest(json!({})));
        let mut ids: Vec<u64> = guests.iter().map(|guest| guest.session).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), round + 1);
        stage.serves(&ids);
        // Between them daemons come and go as ever.
        let daemon = daemon_of(&service);
        kill(Pid::from_raw(daemon), Signal::SIGKILL).unwrap();
        until("it is replaced", || daemon_of(&service) != daemon);
        stage.manager.notified.catches_up();
        service.killed(Signal::SIGKILL);
    }
    let _service = stage.manager.started();

    for guest in &mut guests {
        assert_eq!(guest.hash(), stage.hash);
    }
}

#[test]
fn an_end_in_order_leaves_nothing_in_the_store() {
    let stage = Stage::new(100);
    let service = stage.manager.started();
    let mut guest = stage.guest(json!({}));
    assert_eq!(stage.manager.store().names_of("memfd:uffd-journal").len(), 1);
    stage.parts();

    service.signal(Signal::SIGTERM);

    assert_eq!(service.ends().0, Some(0));
    stage.manager.notified.catches_up();
    assert_eq!(stage.manager.store().names(), Vec::<String>::new());
    guest.reads(5);
    assert_eq!(guest.ends().signal(), Some(Signal::SIGBUS as i32), "it has met its policy");
}

#[test]
fn what_is_over_is_stored_no_more() {
    let stage = Stage::new(100);
    let _service = stage.manager.started();
    let journal = stage.manager.store().len();
    let guest = stage.guest(json!({}));
    assert_eq!(stage.manager.store().len(), journal + OF_A_SESSION + 1, "and its image");

    // Somebody for whom the daemon looks after what it has.
    let mut client = Client::connect(&stage.manager.path());
    client.hello();
    let session = guest.session;
    drop(guest);

    until("only the journal is left", || stage.manager.store().len() == journal);
    assert_eq!(stage.end_of(session).0, "peer-exited");
}

#[test]
fn an_open_file_that_several_things_share_is_stored_once_and_comes_back_for_all() {
    let stage = Stage::new(100);
    let service = stage.manager.started();
    let mut client = Client::connect(&stage.manager.path());
    client.hello_as("shares", &[]);
    let file = File::open(&stage.image).unwrap();
    let path = stage.image.to_str().unwrap();
    for source in [1, 2, 3] {
        let description = match source {
            // The same description of a file, by two descriptors of one message.
            1 => json!({ "kind": "file", "fd": 0, "direct": 1, "path": path }),
            _ => json!({ "kind": "file", "fd": 0, "path": path }),
        };
        let open = json!({ "source": source, "description": description });
        let fds = [file.as_fd(), file.as_fd()];
        let fds = if source == 1 { &fds[..] } else { &fds[..1] };
        assert!(client.ask("source.open", &open, fds)["error"].is_null());
    }
    until("it is stored", || !stage.manager.store().names_of("/image").is_empty());
    let marked = json!({ "source": 4, "description": { "kind": "zero", "size": 4096 } });
    client.ask("source.open", &marked, &[]);
    stage.journal_says("source:shares:4");
    stage.manager.notified.catches_up();
    assert_eq!(stage.manager.store().names_of("/image").len(), 1);
    // One of them goes: the file stays for the others.
    client.ask("source.close", &json!({ "source": 1, "ended": true }), &[]);

    service.killed(Signal::SIGKILL);
    let _service = stage.manager.started();

    let mut client = Client::connect(&stage.manager.path());
    client.hello_as("shares", &[]);
    let mut guests: Vec<Guest> = (0..2).map(|_| stage.guest(json!({}))).collect();
    assert!(guests.iter_mut().all(|guest| guest.hash() == stage.hash));
    for source in [2, 3] {
        // It is open already: without a descriptor nothing else could be.
        let open = json!({ "source": source, "description": { "kind": "file", "fd": 0, "path": path } });
        assert!(client.ask("source.open", &open, &[])["error"].is_null());
    }
}

#[test]
fn a_session_of_which_a_part_is_lost_meets_its_policy_and_says_why() {
    const WHY: &str = "not all of its descriptors came back from the service manager's store";
    for (part, lost) in ["userfaultfd", "record", "pidfd"].into_iter().enumerate() {
        let stage = Stage::new(100);
        let service = stage.manager.started();
        let mut guest = stage.guest(json!({}));
        guest.reads(1);
        guest.has_read(1);
        let parts = stage.parts();
        service.killed(Signal::SIGKILL);
        // It waits, unless nobody has its userfaultfd.
        if part > 0 {
            guest.reads(2);
        }

        stage.manager.store().remove(&parts[part]);
        let service = stage.manager.started();

        service.says(WHY);
        let signal = if part == 0 { Signal::SIGKILL } else { Signal::SIGBUS };
        assert_eq!(guest.ends().signal(), Some(signal as i32), "{lost}");
        let (reason, error) = stage.end_of(guest.session);
        assert_eq!(reason, "pager-lost", "{lost}");
        assert!(error.contains(WHY), "{error}");
        stage.serves(&[]);
        stage.manager.notified.catches_up();
        assert!(parts.iter().all(|part| !stage.manager.store().names().contains(part)), "{lost}");
    }
}

#[test]
fn a_session_whose_image_is_lost_meets_its_policy_where_it_wants_more() {
    let stage = Stage::new(100);
    let service = stage.manager.started();
    let mut guest = stage.guest(json!({ "onFailure": { "kind": "hold" } }));
    let held_for = |stage: &Stage| stage.hello(&[])["sessions"][0]["held"]["reason"].clone();
    guest.reads(1);
    guest.has_read(1);
    let [image] = &stage.manager.store().names_of("/image")[..] else { panic!() };
    service.killed(Signal::SIGKILL);

    stage.manager.store().remove(image);
    let _service = stage.manager.started();

    assert_eq!(held_for(&stage), Value::Null);
    guest.reads(2);
    until("it is held", || held_for(&stage) == "source-failed");
}

#[test]
fn without_a_journal_nothing_is_closed_and_whoever_waits_waits() {
    let stage = Stage::new(100);
    let service = stage.manager.started();
    let mut guest = stage.guest(json!({}));
    let [uffd, ..] = stage.parts();
    service.killed(Signal::SIGKILL);
    guest.reads(2);

    stage.manager.store().names_of("uffd-journal").iter().for_each(|name| stage.manager.store().remove(name));
    let service = stage.manager.started();

    service.says("nothing says what is in the service manager's store");
    let mut other = stage.guest(json!({}));
    assert_eq!(other.hash(), stage.hash, "who comes now is served");
    drop(other);
    service.signal(Signal::SIGTERM);
    assert_eq!(service.ends().0, Some(0));
    stage.manager.notified.catches_up();
    assert!(stage.manager.store().info(&uffd).contains("pending:\t1"), "an end in order is no end of it");
}

#[test]
fn a_store_that_is_full_says_so_and_has_what_it_has_as_a_whole() {
    // The journal and the one after it, an image and a session; room for one more of each is missing by one.
    let stage = Stage::new(2 + 2 * (1 + OF_A_SESSION) - 1);
    let service = stage.manager.started();
    let (mut first, second) = (stage.guest(json!({})), stage.unstored_guest(json!({})));
    service.says("descriptor store is full (FileDescriptorStoreMax=9)");
    stage.journal_says(&format!("session:{}", second.session));
    stage.manager.notified.catches_up();
    let stored = stage.manager.store().len();
    assert_eq!(stored, 1 + 2 + OF_A_SESSION, "two images and one session");
    service.killed(Signal::SIGKILL);

    let service = stage.manager.started();

    assert_eq!(first.hash(), stage.hash);
    stage.serves(&[first.session]);
    let (reason, error) = stage.end_of(second.session);
    assert_eq!(reason, "pager-lost");
    assert!(error.contains("its process is left to itself"), "{error}");
    drop(second);

    // As soon as there is room, what waited for it is stored.
    let [before, ..] = stage.parts();
    let mut third = stage.unstored_guest(json!({}));
    service.says("descriptor store is full");
    drop(first);
    until("the third is stored instead", || {
        let names = |what| stage.manager.store().names_of(what);
        names("userfaultfd]").len() == 1 && names("userfaultfd]")[0] != before && names("pidfd").len() == 1
    });
    service.killed(Signal::SIGKILL);
    let _service = stage.manager.started();
    assert_eq!(third.hash(), stage.hash);
}

#[test]
fn a_manager_that_does_not_listen_holds_up_nobody_and_hears_everything_later() {
    let stage = Stage::new(1000);
    let service = stage.manager.started();
    stage.manager.notified.do_not_listen();
    // The one datagram on which it waits is still taken: more than fit into its queue, however long that is.
    let queue: usize =
        std::fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen").unwrap().trim().parse().unwrap();
    let count = (queue + 2).div_ceil(1 + OF_A_SESSION).clamp(4, 60);
    let mut guests: Vec<Guest> = (0..count).map(|_| stage.unstored_guest(json!({}))).collect();
    assert!(guests.iter_mut().all(|guest| guest.hash() == stage.hash), "they are served");
    let daemon = daemon_of(&service);
    kill(Pid::from_raw(daemon), Signal::SIGKILL).unwrap();
    until("it is replaced", || daemon_of(&service) != daemon);

    stage.manager.notified.listen_again();

    let expected = 1 + count * (1 + OF_A_SESSION);
    until("everything is stored", || stage.manager.store().len() == expected);
    service.killed(Signal::SIGKILL);
    let _service = stage.manager.started();
    assert!(guests.iter_mut().all(|guest| guest.hash() == stage.hash));
}

#[test]
fn with_take_over_switched_off_the_death_of_the_holder_is_the_policys_too() {
    let mut stage = Stage::new(100);
    stage.manager.options = ["--takeover", "off"].map(str::to_owned).to_vec();
    let service = stage.manager.started();
    let mut guest = stage.guest(json!({}));
    service.killed(Signal::SIGKILL);
    guest.reads(2);

    let _service = stage.manager.started();

    assert_eq!(guest.ends().signal(), Some(Signal::SIGBUS as i32));
    let (reason, error) = stage.end_of(guest.session);
    assert_eq!((reason.as_str(), error.contains("the holder has died")), ("pager-lost", true));
}

#[test]
fn a_daemon_that_still_runs_is_ended_by_the_next_holder_before_its_sessions_are_anothers() {
    let stage = Stage::new(100);
    let service = stage.manager.started();
    let mut guest = stage.guest(json!({}));
    let daemon = daemon_of(&service);
    // KillMode=process.
    service.beheaded();
    assert!(is_alive(daemon));

    let service = stage.manager.started();

    service.says("still ran: it is replaced");
    assert!(!is_alive(daemon));
    stage.serves(&[guest.session]);
    assert_eq!(guest.hash(), stage.hash);
}

#[test]
fn a_journal_that_has_become_long_is_written_anew_and_says_the_same() {
    let stage = Stage::new(100);
    let service = stage.manager.started();
    let mut guest = stage.guest(json!({}));
    let journal = stage.manager.store().names_of("uffd-journal");
    let mut client = Client::connect(&stage.manager.path());
    client.hello_as("writes", &[]);
    let file = File::open(&stage.image).unwrap();
    let path = "p".repeat(20_000);

    for source in 1..100 {
        let open = json!({ "source": source, "description": { "kind": "file", "fd": 0, "path": path } });
        assert!(client.ask("source.open", &open, &[file.as_fd()])["error"].is_null());
    }

    until("there is another", || {
        let now = stage.manager.store().names_of("uffd-journal");
        now.len() == 1 && now != journal
    });
    service.killed(Signal::SIGKILL);
    let _service = stage.manager.started();
    assert_eq!(guest.hash(), stage.hash);
}

#[test]
fn a_connection_whose_process_is_not_served_yet_is_read_from_its_beginning() {
    use std::io::Write;
    use std::os::unix::net::{UnixListener, UnixStream};

    let stage = Stage::new(100);
    let service = stage.manager.started();
    let vm = stage.manager.dir.path().join("vm.sock");
    let (listener, file) = (UnixListener::bind(&vm).unwrap(), File::open(&stage.image).unwrap());
    let mut client = Client::connect(&stage.manager.path());
    client.hello_as("serves", &[]);
    let path = stage.image.to_str().unwrap();
    let open = json!({ "source": 1, "description": { "kind": "file", "fd": 0, "path": path } });
    client.ask("source.open", &open, &[file.as_fd()]);
    let serve = json!({ "source": 1, "socket": 0, "handshakeTimeout": 10_000, "maxSessions": 10 });
    assert!(client.ask("firecracker.serve", &serve, &[listener.as_fd()])["error"].is_null());
    drop(listener);
    let mut process = UnixStream::connect(&vm).unwrap();
    process.write_all(b"[{\"base_host_virt_addr\":").unwrap();
    // Journal, image, the server's socket, this connection.
    until("the connection is stored", || stage.manager.store().len() == 4);

    service.killed(Signal::SIGKILL);
    let service = stage.manager.started();

    let mut client = Client::connect(&stage.manager.path());
    let welcome = client.hello_as("serves", &[]);
    assert_eq!(welcome["servers"][0]["socketPath"], vm.to_str().unwrap());
    process.write_all(b" no number}]").unwrap();
    let rejected = std::iter::repeat_with(|| client.told()).find(|told| told["params"]["kind"] == "rejected");
    let error = rejected.unwrap()["params"]["error"]["code"].clone();
    assert_eq!(error, "ERR_UFFD_PROTOCOL", "both halves were read");
    drop(service);
}
