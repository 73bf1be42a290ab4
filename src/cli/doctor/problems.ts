/** Each thing that can be in the way: its cause, and what to do about it, in the words of who has to do it. */

import { constants } from 'node:os';
import { getSystemErrorName } from 'node:util';

import type { Outcome } from './attempts.js';
import type { Facts } from './facts.js';

/** What kind of thing it is; stable, for programs. */
export type ProblemCode =
  | 'addon'
  | 'descriptors'
  | 'device'
  | 'device-cgroup'
  | 'device-driver'
  | 'device-missing'
  | 'device-mode'
  | 'feature'
  | 'kernel-without-userfaultfd'
  | 'not-permitted'
  | 'pidfd'
  | 'platform'
  | 'seccomp'
  | 'security-module'
  | 'syscall';

/** One of them. */
export interface Problem {
  code: ProblemCode;
  /** What is wrong. */
  cause: string;
  /** What to do; any one of these is enough. */
  fix: string[];
}

const DEVICE = '/dev/userfaultfd';
const { EACCES, ENODEV, ENXIO, EPERM } = constants.errno;

/** `EPERM`, or the signal. */
export function nameOf(outcome: Outcome): string {
  if (outcome.ok) return 'ok';
  if (outcome.signal !== undefined) return outcome.signal;
  return outcome.errno === undefined ? 'an unknown error' : getSystemErrorName(-outcome.errno);
}

export function platform({ platform: here }: Facts): Problem {
  return {
    code: 'platform',
    cause: `userfaultfd exists on Linux only; this is ${here}`,
    fix: ['run it on Linux (a virtual machine or a container of Linux will do)'],
  };
}

export function addon({ message, hint }: NonNullable<Facts['addon']>): Problem {
  return { code: 'addon', cause: message, fix: [hint] };
}

export function kernelWithout({ kernel, built }: Facts): Problem {
  return {
    code: 'kernel-without-userfaultfd',
    cause:
      built.config === false
        ? `kernel ${kernel} was built without userfaultfd (CONFIG_USERFAULTFD is not set)`
        : `kernel ${kernel} has no userfaultfd(2): it was built without CONFIG_USERFAULTFD, or a sandbox such as gVisor stands in for it`,
    fix: [
      'boot a kernel with CONFIG_USERFAULTFD=y (those of Debian, Ubuntu, Fedora and the cloud providers have it)',
      'under gVisor: use another runtime (runc, or a virtual machine)',
    ],
  };
}

/** Why the device cannot be used; `undefined` where this kernel has none. */
export function device(facts: Facts, outcome: Outcome): Problem | undefined {
  const { built, device: node, user, container } = facts;
  const minor = built.driver;
  if (node === undefined) {
    if (minor === undefined) return undefined;
    return {
      code: 'device-missing',
      cause: `${DEVICE} does not exist${container === undefined ? '' : ` in this container (${container})`}, although the kernel has its driver`,
      fix: [
        ...intoContainer(container).map(way => (user.uid === 0 ? way : `${way}, ${asOnHost(user)}`)),
        nodeFor(user, minor),
      ],
    };
  }
  const errno = outcome.ok ? undefined : outcome.errno;
  const mode = node.mode.toString(8).padStart(4, '0');
  switch (errno) {
    case EACCES:
      return {
        code: 'device-mode',
        cause: `${DEVICE} is mode ${mode}, owner ${node.uid}, group ${node.gid}: user ${user.name} (uid ${user.uid}) may not read it`,
        fix: [
          `${givenTo(user)} && chmod u+r ${DEVICE}          as root: this user, until the next boot`,
          `setfacl -m u:${user.uid}:r ${DEVICE}          as root: this user beside its owner, until the next boot (package acl)`,
          ...byGroup(user),
        ],
      };
    case EPERM:
      return {
        code: 'device-cgroup',
        cause: `opening ${DEVICE} is not permitted, although it may be read: the device cgroup of a container or service does not list it`,
        fix: [...intoContainer(container), `systemd: DeviceAllow=${DEVICE} r`],
      };
    case ENXIO:
    case ENODEV:
      return {
        code: 'device-driver',
        cause: `${DEVICE} is a node without a driver (${nameOf(outcome)})${minor === undefined ? '' : `: the driver has the number 10, ${minor}`}`,
        fix:
          minor === undefined
            ? [`rm ${DEVICE}, and see to the other way`]
            : [`rm ${DEVICE} && ${nodeFor(user, minor)}`],
      };
    case undefined:
    default:
      return {
        code: 'device',
        cause: `${DEVICE} cannot be used: ${nameOf(outcome)}`,
        fix: [`see to ${DEVICE}: ls -l ${DEVICE}; head -c0 ${DEVICE}`],
      };
  }
}

type User = Facts['user'];

const givenTo = ({ uid }: User): string => `chown ${uid} ${DEVICE}`;

const asOnHost = (user: User): string =>
  `where the node is as on the host: there, as root, first ${givenTo(user)}`;

/** A node that this user, and nobody else, may read. */
function nodeFor(user: User, minor: number): string {
  const made = `mknod -m 0600 ${DEVICE} c 10 ${minor}`;
  return user.uid === 0
    ? `${made}          as root, until the next boot`
    : `${made} && ${givenTo(user)}          as root: this user only, until the next boot`;
}

/** Who has no name can be in no group. */
function byGroup({ uid, name }: User): string[] {
  const rule = `KERNEL=="userfaultfd", GROUP="kvm", MODE="0640"`;
  return name === String(uid)
    ? []
    : [
        `echo '${rule}' > /etc/udev/rules.d/90-userfaultfd.rules && udevadm trigger ${DEVICE} && usermod -aG kvm ${name}          as root: the group kvm, for good; this user is in it from the next login`,
      ];
}

function intoContainer(container: string | undefined): string[] {
  switch (container) {
    case undefined:
      return [];
    case 'kubernetes':
      return [`a device plugin, or a hostPath volume of ${DEVICE} in a privileged container`];
    case 'podman':
      return [`podman run --device ${DEVICE} …`];
    default:
      return [`docker run --device ${DEVICE} …`];
  }
}

/** Neither device nor privilege: the kernel itself says no. */
export function notPermitted({ built, ptrace, user, userNamespace }: Facts): Problem {
  const sysctl =
    built.sysctl === undefined
      ? 'vm.unprivileged_userfaultfd does not exist'
      : 'vm.unprivileged_userfaultfd is 0';
  const capability = ptrace
    ? 'CAP_SYS_PTRACE of a user namespace does not count'
    : 'the process does not have CAP_SYS_PTRACE';
  return {
    code: 'not-permitted',
    cause: `user ${user.name} (uid ${user.uid}) may not create a userfaultfd by userfaultfd(2): ${sysctl}, and ${capability}`,
    fix: [
      ...(built.sysctl === undefined
        ? []
        : [
            'sysctl vm.unprivileged_userfaultfd=1          as root: every user of this machine, until the next boot',
          ]),
      userNamespace
        ? 'run it outside of the user namespace with CAP_SYS_PTRACE'
        : 'give the program CAP_SYS_PTRACE (systemd: AmbientCapabilities=CAP_SYS_PTRACE; docker run --cap-add SYS_PTRACE)',
    ],
  };
}

export function seccomp({ container }: Facts, outcome: Outcome): Problem {
  const how =
    !outcome.ok && outcome.signal !== undefined ? 'kills the process' : `answers ${nameOf(outcome)}`;
  return {
    code: 'seccomp',
    cause: `a seccomp filter refuses the system call userfaultfd(2): it ${how}`,
    fix: [
      ...(container === undefined
        ? ['systemd: SystemCallFilter=userfaultfd']
        : [
            'docker run --security-opt seccomp=PROFILE, where PROFILE is the default one with userfaultfd added',
          ]),
      'let whoever has set the filter allow the call',
    ],
  };
}

export function securityModule({ modules }: Facts, outcome: Outcome): Problem {
  return {
    code: 'security-module',
    cause: `userfaultfd(2) answers ${nameOf(outcome)}, which the kernel itself does not: a security module refuses it (here: ${modules.join(', ')})`,
    fix: [
      'SELinux: ausearch -m avc -c node, then allow the class anon_inode to the domain',
      'AppArmor: dmesg | grep DENIED, then change the profile',
    ],
  };
}

export function syscall(outcome: Outcome): Problem {
  return {
    code: 'syscall',
    cause: `userfaultfd(2) fails: ${nameOf(outcome)}`,
    fix: ['strace -f -e userfaultfd npx userfaultfd doctor shows the call'],
  };
}

/** The limit is the hard one, whatever it was in the shell: Node has raised the soft limit as far as it may before anything is asked. */
export function descriptors(
  { descriptors: { soft, open }, user, container }: Facts,
  sessions?: number,
): Problem {
  const service = 'systemd: LimitNOFILE=65536; docker run --ulimit nofile=65536';
  const shell =
    'prlimit --pid PID --nofile=65536:65536          as root: PID is the shell that starts the program';
  return {
    code: 'descriptors',
    cause:
      sessions === undefined
        ? `no descriptor is free: RLIMIT_NOFILE is ${soft}, the hard limit`
        : `RLIMIT_NOFILE is ${soft}, the hard limit, and ${open} are open: room for ${sessions} sessions`,
    fix:
      container === undefined
        ? [
            shell,
            `echo '${user.name} - nofile 65536' > /etc/security/limits.d/90-userfaultfd.conf          as root, for good: from the next login`,
            service,
          ]
        : [service, shell],
  };
}

export function pidfd({ kernel }: Facts, outcome: Outcome): Problem {
  return {
    code: 'pidfd',
    cause: `pidfd_open(2) fails on kernel ${kernel}: ${nameOf(outcome)}; the served process can neither be watched nor killed`,
    fix: [
      'Linux 5.3 or newer',
      'where it is newer: let the seccomp filter allow pidfd_open and pidfd_send_signal',
    ],
  };
}

export function feature({ kernel }: Facts, name: string, since: string, without: string): Problem {
  return {
    code: 'feature',
    cause: `kernel ${kernel} does not have '${name}': ${without}`,
    fix: [`Linux ${since} or newer`],
  };
}
