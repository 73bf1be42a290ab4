/** What can be found out about this machine, user and container. Nothing is judged here. */

import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { release, userInfo } from 'node:os';
import process from 'node:process';
import { gunzipSync } from 'node:zlib';

import { capabilities, hasPtrace } from '../../capabilities.js';
import { UffdError } from '../../errors.js';
import { native } from '../../native.js';
import { attemptAll, type Outcomes } from './attempts.js';

/** What a diagnosis is made of. */
export interface Facts {
  /** uname -r. */
  kernel: string;
  platform: string;
  node: string;
  user: { uid: number; name: string };
  /** What kind of container this is, where that shows. */
  container?: string;
  /** Why the addon could not be loaded. */
  addon?: { message: string; hint: string };
  /** What shows that the kernel was built with userfaultfd; each `undefined` where it does not show. */
  built: {
    /** vm.unprivileged_userfaultfd (since Linux 5.2). */
    sysctl?: boolean;
    /** The driver of /dev/userfaultfd: its minor number (since Linux 6.1). */
    driver?: number;
    /** CONFIG_USERFAULTFD in the kernel's configuration. */
    config?: boolean;
  };
  /** /dev/userfaultfd. */
  device?: { mode: number; uid: number; gid: number };
  /** CAP_SYS_PTRACE, in effect. */
  ptrace: boolean;
  /** Whether this is a user namespace of its own: capabilities of it do not count for userfaultfd(2). */
  userNamespace: boolean;
  /** Whether system calls of this process are filtered. */
  seccomp: boolean;
  /** Security modules that may refuse. */
  modules: string[];
  /** What came of trying; absent where the addon could not be loaded. */
  outcomes?: Outcomes;
  /** Features of the kernel, where they could be asked for. */
  features: string[];
  /** RLIMIT_NOFILE, and descriptors that are open. */
  descriptors: { soft: number; hard: number; open: number };
}

/** Finds out. */
export function collectFacts(): Facts {
  const status = text('/proc/self/status') ?? '';
  const facts: Facts = {
    kernel: release(),
    platform: `${process.platform}-${process.arch}`,
    node: process.versions.node,
    user: user(),
    built: evidence(),
    ptrace: hasPtrace(),
    userNamespace: !/^\s*0\s+0\s+4294967295$/.test(text('/proc/self/uid_map') ?? '0 0 4294967295'),
    seccomp: /^Seccomp:\s*[12]$/m.test(status),
    modules: (text('/sys/kernel/security/lsm') ?? '').split(',').filter(Boolean),
    features: [],
    descriptors: descriptors(),
  };
  const container = containerKind();
  if (container !== undefined) facts.container = container;
  const device = statSync('/dev/userfaultfd', { throwIfNoEntry: false });
  if (device) facts.device = { mode: device.mode & 0o7777, uid: device.uid, gid: device.gid };
  try {
    native();
    // What may kill whoever calls is tried in a process of its own, before it is called here.
    facts.outcomes = attemptAll();
    if (mayAsk(facts.outcomes)) facts.features = capabilities().features.map(String);
  } catch (error) {
    if (!(error instanceof UffdError)) throw error;
    facts.addon = { message: error.message, hint: error.hint ?? '' };
  }
  return facts;
}

/** Asking for features makes the same calls once more, here. */
function mayAsk(outcomes: Outcomes): boolean {
  return Object.values(outcomes).every(outcome => outcome.ok || outcome.signal === undefined);
}

function user(): Facts['user'] {
  const uid = process.getuid?.() ?? -1;
  try {
    return { uid, name: userInfo().username };
  } catch {
    return { uid, name: String(uid) }; // not in passwd, as in many containers
  }
}

function evidence(): Facts['built'] {
  const built: Facts['built'] = {};
  if (existsSync('/proc/sys/vm')) {
    const sysctl = text('/proc/sys/vm/unprivileged_userfaultfd');
    if (sysctl !== undefined) built.sysctl = sysctl === '1';
  }
  const minor = /^\s*(\d+) userfaultfd$/m.exec(text('/proc/misc') ?? '')?.[1];
  if (minor !== undefined) built.driver = Number(minor);
  const config = kernelConfig();
  if (config !== undefined) built.config = /^CONFIG_USERFAULTFD=y$/m.test(config);
  return built;
}

function kernelConfig(): string | undefined {
  try {
    return gunzipSync(readFileSync('/proc/config.gz')).toString('latin1');
  } catch {
    return text(`/boot/config-${release()}`);
  }
}

function containerKind(): string | undefined {
  if (process.env['KUBERNETES_SERVICE_HOST'] !== undefined) return 'kubernetes';
  if (existsSync('/run/.containerenv')) return 'podman';
  if (existsSync('/.dockerenv')) return 'docker';
  return text('/run/systemd/container');
}

function descriptors(): Facts['descriptors'] {
  const row = /^Max open files\s+(\S+)\s+(\S+)/m.exec(text('/proc/self/limits') ?? '');
  const [soft = Infinity, hard = Infinity] = [row?.[1], row?.[2]].map(limit =>
    limit === undefined || limit === 'unlimited' ? Infinity : Number(limit),
  );
  return { soft, hard, open: existsSync('/proc/self/fd') ? readdirSync('/proc/self/fd').length : 0 };
}

function text(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return undefined;
  }
}
