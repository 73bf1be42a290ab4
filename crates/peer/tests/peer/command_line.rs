//! Starting and ending: what is refused, with which status, and how the process ends by itself.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::support::peer::{Peer, command, run};
use crate::support::{Pool, needs_uffd};

/// Without privileges: `nobody` on every Linux.
const NOBODY: u32 = 65534;

fn complaint(arguments: &[&str]) -> String {
    let output = run(arguments);
    let complaint = String::from_utf8(output.stderr).unwrap();

    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    assert!(output.stdout.is_empty());
    complaint
}

#[test]
fn a_refused_command_line_is_status_2_and_one_line_that_names_it() {
    for (arguments, named) in [
        (&["--colour"][..], "--colour"),
        (&["--no-connect"], "--region"),
        (&["--region", "4K"], "--socket"),
        (&["--no-connect", "--region", "5000"], "5000"),
        (&["--no-connect", "--region"], "--region"),
        (&["--no-connect", "--region", "4K", "--fd", "a\nb"], "--fd"),
    ] {
        let line = complaint(arguments);

        assert!(line.contains(named), "{line}");
    }
}

#[test]
fn help_is_status_0_and_names_every_command() {
    let output = run(&["--help"]);
    let text = String::from_utf8(output.stdout).unwrap();

    assert_eq!(output.status.code(), Some(0));
    for word in
        ["touch", "hash", "read", "write", "discard", "discard-random", "zeros", "compare", "resident"]
    {
        assert!(text.contains(&format!("\n  {word} ")), "{word}");
    }
}

#[test]
fn a_socket_path_without_anything_is_status_2_with_the_errno() {
    needs_uffd!();
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("nothing");

    let line = complaint(&["--socket", path.to_str().unwrap(), "--region", "4K"]);

    assert!(line.contains("connect") && line.contains("os error 2)"), "{line}");
}

#[test]
fn a_socket_path_where_nobody_listens_is_status_2_with_the_errno() {
    needs_uffd!();
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("plain-file");
    fs::write(&path, "").unwrap();

    let line = complaint(&["--socket", path.to_str().unwrap(), "--region", "4K"]);

    assert!(line.contains("connect") && line.contains("os error 111)"), "{line}");
}

#[test]
fn an_unknown_feature_is_status_2_and_named_with_its_bits() {
    needs_uffd!();

    let line = complaint(&["--no-connect", "--region", "4K", "--features", "8000000000000000"]);

    assert!(line.contains("UFFDIO_API") && line.contains("0x8000000000000000"), "{line}");
}

#[test]
fn a_cpu_that_does_not_exist_is_status_2_and_named() {
    let line = complaint(&["--no-connect", "--region", "4K", "--cpu", "8191"]);

    assert!(line.contains("sched_setaffinity(CPU 8191)") && line.contains("os error 22)"), "{line}");
}

#[test]
fn huge_pages_from_an_empty_pool_are_status_2_and_name_the_pool() {
    let Some(_pool) = Pool::with(0) else { return };

    let line = complaint(&["--no-connect", "--region", "2M", "--page-size", "2097152"]);

    assert!(line.contains("pool of huge pages is empty"), "{line}");
}

/// Runs a peer as a user without privileges; `None`, with the reason printed, where that shows nothing.
fn unprivileged(arguments: &[&str]) -> Option<Output> {
    // SAFETY: geteuid takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root can start a process without privileges");
        return None;
    }
    if fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap().trim() != "0" {
        eprintln!("skipped: vm.unprivileged_userfaultfd lets everybody make one");
        return None;
    }
    match fs::metadata("/dev/userfaultfd") {
        Ok(device) if device.mode() & 0o006 == 0 => {}
        device => {
            eprintln!("skipped: /dev/userfaultfd is missing or open to everybody: {device:?}");
            return None;
        }
    }
    // Nobody may not search the build directory. Another process copies, because a descriptor open for writing
    // in this one could be inherited by a child of another test, and the copy would be too busy to run.
    let directory = TempDir::new().unwrap();
    let copy = directory.path().join("peer");
    assert!(Command::new("cp").arg(command().get_program()).arg(&copy).status().unwrap().success());
    for path in [directory.path(), &copy] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new(&copy);
    Some(command.uid(NOBODY).gid(NOBODY).args(arguments).stdin(Stdio::null()).output().unwrap())
}

#[test]
fn without_privileges_the_complaint_names_the_device_and_the_syscall() {
    let Some(output) = unprivileged(&["--no-connect", "--region", "4K"]) else { return };
    let line = String::from_utf8(output.stderr).unwrap();

    assert_eq!(output.status.code(), Some(2), "{line}");
    assert!(line.contains("/dev/userfaultfd: Permission denied (os error 13)"), "{line}");
    assert!(line.contains("syscall userfaultfd(0x80800): Operation not permitted (os error 1)"), "{line}");
}

#[test]
fn with_the_syscall_alone_the_device_is_not_tried() {
    let Some(output) = unprivileged(&["--no-connect", "--region", "4K", "--syscall"]) else { return };
    let line = String::from_utf8(output.stderr).unwrap();

    assert_eq!(output.status.code(), Some(2), "{line}");
    assert!(line.contains("syscall userfaultfd") && !line.contains("/dev/userfaultfd"), "{line}");
}

#[test]
fn without_privileges_faults_of_user_mode_alone_are_allowed() {
    let Some(output) = unprivileged(&["--no-connect", "--region", "4K", "--user-mode-only"]) else { return };

    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_end_of_the_input_is_status_0() {
    needs_uffd!();
    let mut peer = Peer::start(&["--no-connect", "--region", "4K"]);
    peer.line();

    peer.close_input();

    assert_eq!(peer.status().code(), Some(0));
}

#[test]
fn exit_is_answered_and_gives_its_status() {
    needs_uffd!();
    let mut peer = Peer::start(&["--no-connect", "--region", "4K"]);
    peer.line();

    let answer = peer.command("exit 7");

    assert_eq!(answer["command"], "exit");
    assert_eq!(peer.status().code(), Some(7));
}

#[test]
fn a_peer_with_a_cpu_may_run_on_no_other() {
    needs_uffd!();
    let mut peer = Peer::start(&["--no-connect", "--region", "4K", "--cpu", "0"]);
    peer.line();

    let status = fs::read_to_string(format!("/proc/{}/status", peer.pid())).unwrap();
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();

    assert_eq!(allowed.trim(), "0");
}
