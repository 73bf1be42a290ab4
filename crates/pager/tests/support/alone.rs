//! The test program again, running one test alone in a process of its own: for what can hang, or changes the whole process.
#![allow(unreachable_pub, reason = "a module of a test program is its own crate's")]
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says so by panicking")]

use std::process::Command;
use std::time::Duration;

use uffd::liveness::PidFd;

const ALONE: &str = "PAGER_TEST_ALONE";

/// Runs a test in a process of its own, which is killed when it takes longer than that.
pub fn alone(test: &str, deadline: Duration, act: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some_and(|name| name == test) {
        act();
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(ALONE, test);
    command.stdout(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    // The little it prints fits into the pipe.
    let ended = PidFd::open(child.id() as i32).is_ok_and(|process| process.wait(deadline).unwrap());
    if !ended {
        child.kill().unwrap();
    }
    let output = child.wait_with_output().unwrap();
    // The harness's own lines would be counted as those of this program.
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let said = line.split_once(" ... ").map_or(line, |(_, said)| said);
        if !said.is_empty() && !said.starts_with("running ") && !said.starts_with("test ") && said != "ok" {
            println!("{said}");
        }
    }
    let how = if ended { "failed" } else { "still running" };
    assert!(ended && output.status.success(), "{test}: {}, {how}", output.status);
}
