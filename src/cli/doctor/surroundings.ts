/** What can be read about this machine, user and container: few descriptors are needed for it, and none of what is tried. */

import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { release, userInfo } from 'node:os';
import process from 'node:process';
import { gunzipSync } from 'node:zlib';

import { hasPtrace } from '../../capabilities.js';
import type { Facts } from './facts.js';

/** Reads it. */
export function lookAround(): Facts {
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
  return facts;
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
