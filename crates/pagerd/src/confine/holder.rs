//! The system calls that the holder may not make, nor anything that it starts: an upgrade's executable has the same. So it is a list of
//! what neither ever takes.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule,
    sock_filter,
};

use super::{compiled, in_text};

/// `kexec_file_load`, for which musl's `libc` has no name on arm64.
const KEXEC_FILE_LOAD: i64 = if cfg!(target_arch = "x86_64") { 320 } else { 294 };
#[cfg(target_arch = "x86_64")]
const _: () = assert!(KEXEC_FILE_LOAD == libc::SYS_kexec_file_load);

/// EPERM.
const REFUSED: &[i64] = &[
    // Other processes, and their memory.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_perf_event_open,
    // Memory is handed over, and never taken.
    libc::SYS_userfaultfd,
    // Other users, and more rights.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    // Other files than one sees.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mknodat,
    libc::SYS_fchownat,
    libc::SYS_fchown,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_quotactl,
    // The machine.
    libc::SYS_bpf,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    KEXEC_FILE_LOAD,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_vhangup,
    libc::SYS_personality,
    // What goes around all of this.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // The socket is there already.
    libc::SYS_bind,
    libc::SYS_listen,
];

/// Older names, and what only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLDER: &[i64] = &[
    libc::SYS_mknod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[i64] = &[];

/// `BPF_LD | BPF_W | BPF_ABS`, `BPF_JMP | BPF_JEQ | BPF_K`, `BPF_RET | BPF_K`.
const BPF_LOAD: u16 = 0x20;
const BPF_JUMP_EQUAL: u16 = 0x15;
const BPF_RETURN: u16 = 0x06;

/// Namespaces of its own.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// Each is applied beside the others.
pub(super) fn filters() -> Result<Vec<BpfProgram>, String> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().chain(OLDER).map(|&call| (call, Vec::new())).collect();
    let local = condition(SeccompCmpOp::Ne, libc::AF_UNIX);
    rules.insert(libc::SYS_socket, vec![local.map_err(in_text)?]);
    let spaces = NAMESPACES.map(|flag| condition(SeccompCmpOp::MaskedEq(flag as u64), flag));
    rules.insert(libc::SYS_clone, spaces.into_iter().collect::<Result<_, _>>().map_err(in_text)?);
    // What it is asked for is in memory, which no filter sees; whoever finds that there is no such call takes the other.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let refusing =
        |rules, errno: i32| compiled(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32));
    let mut filters = vec![refusing(rules, libc::EPERM)?, refusing(clone3, libc::ENOSYS)?];
    filters.iter_mut().for_each(let_ioctl_through);
    Ok(filters)
}

/// Faults are answered by ioctls, which no list here names: they pass each list before it is gone through.
fn let_ioctl_through(filter: &mut BpfProgram) {
    // Behind the check of the architecture, which comes first: the number of the call is loaded.
    const LOADED: usize = 3;
    let is_load = |at: &sock_filter| (at.code, at.k) == (BPF_LOAD, 0);
    if filter.get(LOADED).is_some_and(is_load) {
        let is_ioctl = sock_filter { code: BPF_JUMP_EQUAL, jt: 0, jf: 1, k: libc::SYS_ioctl as u32 };
        let allow = sock_filter { code: BPF_RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
        filter.splice(LOADED + 1..LOADED + 1, [is_ioctl, allow]);
    }
}

/// About the first argument.
fn condition(op: SeccompCmpOp, value: i32) -> Result<SeccompRule, BackendError> {
    SeccompCondition::new(0, SeccompCmpArgLen::Dword, op, value as u64)
        .and_then(|condition| SeccompRule::new(vec![condition]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctls_are_looked_at_first_and_everything_else_as_before() {
        for filter in filters().unwrap() {
            let at = filter.iter().position(|at| at.k == libc::SYS_ioctl as u32 && at.code == BPF_JUMP_EQUAL);
            assert_eq!(at, Some(4));
            assert_eq!(filter[5].k, libc::SECCOMP_RET_ALLOW);
        }
    }
}
