//! What the holder and the daemon give up before they talk to anybody: new privileges, files, and system calls. Whatever they start
//! later has it the same way, so the daemon gives up more than its holder has.

mod daemon;
mod holder;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, BitFlags, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
    path_beneath_rules,
};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_no_new_privs;
use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompFilter, SeccompRule};
use serde_json::{Value, json};

use crate::args::Confinement;

/// Read by the pager: what a descriptor is (`fdinfo`), whether a process lives, where huge pages are.
const READABLE: [&str; 2] = ["/proc", "/sys/kernel/mm"];

/// What may be done with files: everything that is not named is refused.
struct Files<'a> {
    paths: &'a [&'a Path],
    access: BitFlags<AccessFs>,
}

/// Gives up what a daemon of this level does not need. What the kernel does not have is told, and is no reason not to serve.
pub(crate) fn confine(level: Confinement) -> Value {
    let readable = READABLE.map(Path::new);
    let files = Files { paths: &readable, access: AccessFs::ReadFile | AccessFs::ReadDir };
    give_up(level, &[files], daemon::filter().map(|filter| vec![filter]))
}

/// The same for a holder, which may remove its socket.
pub(crate) fn confine_holder(level: Confinement, socket: Option<&Path>) -> Value {
    // What is in its place is removed with it: the directory is what the right is about.
    let here = |directory: &Path| directory.as_os_str().is_empty();
    let directory = socket
        .and_then(Path::parent)
        .map(|directory| if here(directory) { Path::new(".") } else { directory });
    let directory: Vec<&Path> = directory.into_iter().collect();
    let read = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::Execute;
    let files = [
        Files { paths: &[Path::new("/")], access: read },
        Files { paths: &[Path::new("/dev/null")], access: AccessFs::ReadFile | AccessFs::WriteFile },
        Files { paths: &directory, access: AccessFs::RemoveFile.into() },
    ];
    give_up(level, &files, holder::filters())
}

fn give_up(level: Confinement, files: &[Files<'_>], filters: Result<Vec<BpfProgram>, String>) -> Value {
    if level == Confinement::Off {
        return json!({ "privileges": false, "files": "off", "calls": false });
    }
    let privileges = set_no_new_privs().is_ok();
    let files = match level {
        Confinement::All => confine_files(files).map_or_else(|error| format!("failed: {error}"), in_words),
        Confinement::Calls | Confinement::Off => "off".to_owned(),
    };
    let calls = filters.and_then(|filters| {
        let mut filters = filters.iter();
        filters.try_for_each(|filter| seccompiler::apply_filter(filter)).map_err(|error| error.to_string())
    });
    if let Err(error) = &calls {
        crate::log(format_args!("system calls are not restricted: {error}"));
    }
    json!({ "privileges": privileges, "files": files, "calls": calls.is_ok() })
}

/// A filter by which calls that a rule matches have one outcome, and all others another.
fn compiled(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, String> {
    let arch = std::env::consts::ARCH.try_into().map_err(in_text)?;
    SeccompFilter::new(rules, others, these, arch).and_then(TryInto::try_into).map_err(in_text)
}

fn in_text(error: BackendError) -> String {
    error.to_string()
}

fn confine_files(files: &[Files<'_>]) -> Result<RulesetStatus, RulesetError> {
    // What a newer kernel can refuse beyond this is not known here; what an older one cannot is left out.
    let mut ruleset = Ruleset::default().handle_access(AccessFs::from_all(ABI::V5))?.create()?;
    for Files { paths, access } in files {
        ruleset = ruleset.add_rules(path_beneath_rules(*paths, *access))?;
    }
    Ok(ruleset.restrict_self()?.ruleset)
}

fn in_words(status: RulesetStatus) -> String {
    match status {
        RulesetStatus::FullyEnforced => "enforced",
        RulesetStatus::PartiallyEnforced => "partly enforced: this kernel's Landlock is older",
        RulesetStatus::NotEnforced => "not enforced: this kernel has no Landlock",
    }
    .to_owned()
}

fn errno(result: io::Result<()>) -> i32 {
    result.err().and_then(|error| error.raw_os_error()).unwrap_or(0)
}

fn of(result: nix::Result<()>) -> i32 {
    result.err().map_or(0, |errno| errno as i32)
}

/// Tries, confined, what a holder and then a daemon that were taken over by somebody would try; for the tests (`--try-confinement`). The
/// errno of each, or 0.
pub(crate) fn try_out(level: Confinement) -> Value {
    let socket = std::env::temp_dir().join(format!("userfaultfd-pagerd-{}.sock", std::process::id()));
    let listener = std::os::unix::net::UnixListener::bind(&socket);
    let holder = try_holder(level, &socket);
    drop(listener);
    let confined = confine(level);
    let open = |path: &str| errno(std::fs::File::open(path).map(drop));
    let tried = json!({
        "holder": holder,
        "confined": confined,
        "read": open("/etc/passwd"),
        "fdinfo": open("/proc/self/fdinfo/0"),
        "memory": open("/proc/1/mem"),
        "write": errno(std::fs::write(socket.with_extension("made"), "")),
        "connect": errno(std::net::UdpSocket::bind("127.0.0.1:0").map(drop)),
        "listen": errno(UnixDatagram::unbound().map(drop)),
        "run": errno(std::process::Command::new("/bin/true").status().map(drop)),
    });
    // Where it could be made, it can be removed.
    let _ = std::fs::remove_file(socket.with_extension("made"));
    let _ = std::fs::remove_file(socket.with_extension("other"));
    let _ = std::fs::remove_dir(socket.with_extension("dir"));
    tried
}

fn try_holder(level: Confinement, socket: &Path) -> Value {
    let confined = confine_holder(level, Some(socket));
    let call = |number| {
        // SAFETY: none of the calls below does anything with these, which no address, process or command is.
        of(Errno::result(unsafe { libc::syscall(number, -1_i64, -1_i64, -1_i64, -1_i64, -1_i64, -1_i64) })
            .map(drop))
    };
    json!({
        "confined": confined,
        "read": errno(std::fs::File::open("/etc/passwd").map(drop)),
        "write": errno(std::fs::write(socket.with_extension("made"), "")),
        "append": errno(std::fs::OpenOptions::new().append(true).open("/dev/zero").map(drop)),
        "make": errno(std::fs::create_dir(socket.with_extension("dir"))),
        "run": errno(std::process::Command::new("/bin/true").stdin(std::process::Stdio::null()).status().map(drop)),
        "tell": errno(UnixDatagram::unbound().map(drop)),
        "connect": errno(std::net::UdpSocket::bind("127.0.0.1:0").map(drop)),
        "listen": errno(std::os::unix::net::UnixListener::bind(socket.with_extension("other")).map(drop)),
        "namespace": of(unshare(CloneFlags::CLONE_NEWUTS)),
        "trace": call(libc::SYS_ptrace),
        "readMemory": call(libc::SYS_process_vm_readv),
        "userfaultfd": call(libc::SYS_userfaultfd),
        "ring": call(libc::SYS_io_uring_setup),
        "bpf": call(libc::SYS_bpf),
        "mount": call(libc::SYS_mount),
        "thread": errno(std::thread::Builder::new().spawn(|| {}).map(drop)),
        "removeSocket": errno(std::fs::remove_file(socket)),
    })
}
