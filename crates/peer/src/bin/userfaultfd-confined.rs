//! `userfaultfd-confined ERRNO|kill PROGRAM ARGUMENTS...`: runs a program under a seccomp filter that answers userfaultfd(2)
//! with an errno, or kills whoever calls it. What a container's runtime does, for the tests of `userfaultfd doctor`.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let error = match (args.next().as_deref().and_then(answer_of), args.next()) {
        (Some(answer), Some(program)) => run(answer, program, args),
        _ => "usage: userfaultfd-confined ERRNO|kill PROGRAM ARGUMENTS...".to_owned(),
    };
    eprintln!("userfaultfd-confined: {error}");
    ExitCode::from(2)
}

/// What the filter is to return.
fn answer_of(word: &std::ffi::OsStr) -> Option<u32> {
    let word = word.to_str()?;
    if word == "kill" {
        return Some(libc::SECCOMP_RET_KILL_PROCESS);
    }
    let errno: u32 = word.parse().ok().filter(|errno| (1..4096).contains(errno))?;
    Some(libc::SECCOMP_RET_ERRNO | errno)
}

/// Comes back only with what went wrong.
fn run(answer: u32, program: OsString, args: impl Iterator<Item = OsString>) -> String {
    match confine(answer) {
        Ok(()) => Command::new(program).args(args).exec().to_string(),
        Err(error) => error.to_string(),
    }
}

fn confine(answer: u32) -> io::Result<()> {
    // Loads the number of the call, compares, answers or lets it through.
    let mut code = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_userfaultfd as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, answer),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    let on: libc::c_ulong = 1;
    let none: libc::c_ulong = 0;
    // SAFETY: takes numbers only.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, on, none, none, none) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let mode = libc::c_ulong::from(libc::SECCOMP_MODE_FILTER);
    // SAFETY: `filter` and the code it points to outlive the call, which copies both.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}
