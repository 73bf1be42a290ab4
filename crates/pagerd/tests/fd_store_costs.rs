//! What a store of the service manager costs: `cargo test -p pagerd --test fd_store_costs -- --nocapture`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

mod support;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde_json::json;
use support::client::Client;
use support::guest::{self, Guest};
use support::service::Service;
use support::{Manager, Notify, until};

const GUESTS: usize = 16;
const DEATHS: usize = 20;
const SOURCES: u64 = 1000;

/// Not a test: the process that the others have served.
#[test]
fn a_guest() {
    guest::run_if_asked();
}

fn now() -> f64 {
    Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap()).as_secs_f64() * 1000.0
}

/// The daemon that answers, and since when it does.
fn serving(manager: &Manager) -> Option<(i32, f64)> {
    let welcome = Client::connect(&manager.path()).hello();
    Some((welcome["pid"].as_i64()? as i32, welcome["servingSince"].as_f64()?))
}

fn killed(pid: i32) -> f64 {
    let at = now();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    at
}

/// Milliseconds from the death of the daemon until the next serves; the median of some.
fn take_over(manager: &Manager) -> f64 {
    let mut outages: Vec<f64> = (0..DEATHS)
        .map(|_| {
            let (pid, _) = serving(manager).unwrap();
            let at = killed(pid);
            let mut since = 0.0;
            until("another serves", || {
                // The connection may be in the queue of the one that was killed.
                let next = serving(manager).filter(|&(next, _)| next != pid);
                since = next.map_or(0.0, |(_, since)| since);
                next.is_some()
            });
            since - at
        })
        .collect();
    outages.sort_by(f64::total_cmp);
    outages[DEATHS / 2]
}

/// Microseconds on a processor that the holder takes for something that is kept and forgotten again, with a descriptor.
fn keeping(manager: &Manager, service: &Service, image: &std::path::Path) -> f64 {
    let ran = || -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{}/schedstat", service.pid())).unwrap();
        text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1000.0
    };
    let mut client = Client::connect(&manager.path());
    client.hello_as("opens", &[]);
    let before = ran();
    for source in 1..=SOURCES {
        let file = File::open(image).unwrap();
        let description = json!({ "kind": "file", "fd": 0, "path": image });
        client.ask("source.open", &json!({ "source": source, "description": description }), &[file.as_fd()]);
    }
    for source in 1..=SOURCES {
        client.ask("source.close", &json!({ "source": source, "ended": true }), &[]);
    }
    let mut last = before;
    until("the holder has done everything", || {
        std::thread::sleep(Duration::from_millis(250));
        std::mem::replace(&mut last, ran()) == ran()
    });
    (last - before) / SOURCES as f64
}

#[test]
fn with_a_store_a_take_over_takes_about_as_long_and_nobody_waits_100_ms() {
    for most in [0, 10_000] {
        let manager = Manager::with_store(Notify::Path, most);
        let image = manager.dir.path().join("image");
        let hash = guest::image(&image, 64);
        let service = manager.started();
        let mut guests: Vec<Guest> =
            (0..GUESTS).map(|_| Guest::start(&manager.path(), &image, json!({}))).collect();

        let outage = take_over(&manager);
        println!("store of {most}: {GUESTS} sessions, {DEATHS} deaths of the daemon, median {outage:.1} ms");
        assert!(outage < 100.0);
        let kept = keeping(&manager, &service, &image);
        println!("store of {most}: the holder works {kept:.1} us for what is kept and forgotten");

        if most == 0 {
            continue;
        }
        until("all are stored", || manager.store().names_of("pidfd").len() == GUESTS);
        service.killed(Signal::SIGKILL);
        let at = now();
        let _service = manager.started();
        let (_, since) = serving(&manager).unwrap();
        println!("store of {most}: the service is started again and serves within {:.1} ms", since - at);
        assert!(guests.iter_mut().all(|guest| guest.hash() == hash));
    }
}
