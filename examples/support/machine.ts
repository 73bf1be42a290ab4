/** What this machine and this user can do. */

import { accessSync, constants, readFileSync, statSync } from 'node:fs';
import { userInfo } from 'node:os';

const DEVICE = '/dev/userfaultfd';
const CAP_SYS_PTRACE = 19n;

/** The CPUs this process may run on. */
export function allowedCpus(): number[] {
  const list = /^Cpus_allowed_list:\s*(\S+)/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1] ?? '0';
  return list.split(',').flatMap(part => {
    const [first = 0, last = first] = part.split('-').map(Number);
    return Array.from({ length: last - first + 1 }, (_, index) => first + index);
  });
}

/** Why a process of this user cannot create a userfaultfd that sees faults of the kernel, and what to do; else nothing. */
export function whyNoUserfaultfd(): string | undefined {
  const device = deviceProblem();
  if (device === undefined) return undefined;
  const capabilities = /^CapEff:\s*([0-9a-f]+)/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1] ?? '0';
  if ((BigInt(`0x${capabilities}`) >> CAP_SYS_PTRACE) & 1n) return undefined;
  const sysctl = read('/proc/sys/vm/unprivileged_userfaultfd');
  if (sysctl === '1') return undefined;
  const { username, uid } = userInfo();
  return [
    `User ${username} (uid ${uid}) may not create a userfaultfd that handles faults inside system calls, as Firecracker needs:`,
    `  - ${device}`,
    `  - vm.unprivileged_userfaultfd is ${sysctl ?? 'not there (no userfaultfd in this kernel?)'}, so the system call is not allowed`,
    '  - the process does not have CAP_SYS_PTRACE',
    'Any one of these gives it (as root):',
    `  setfacl -m u:${uid}:r ${DEVICE}          only this user, until the next boot`,
    `  chgrp GROUP ${DEVICE}; chmod 0640 ${DEVICE}    a group, until the next boot (make it a udev rule)`,
    '  sysctl vm.unprivileged_userfaultfd=1        every user of this machine',
  ].join('\n');
}

function deviceProblem(): string | undefined {
  try {
    accessSync(DEVICE, constants.R_OK);
    return undefined;
  } catch {
    const stat = statSync(DEVICE, { throwIfNoEntry: false });
    if (stat === undefined) return `${DEVICE} does not exist (Linux 6.1 has it; containers often do not)`;
    const mode = (stat.mode & 0o777).toString(8).padStart(4, '0');
    return `${DEVICE} is mode ${mode}, owner ${stat.uid}, group ${stat.gid}: not readable for this user`;
  }
}

function read(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return undefined;
  }
}
