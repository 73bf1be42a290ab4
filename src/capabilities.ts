import { accessSync, constants, existsSync, readdirSync, readFileSync } from 'node:fs';
import { release } from 'node:os';

import type { NativeFactory } from '#native';

import { fromNative, type UffdError } from './errors.js';
import type { Feature, Ioctl, OrBit } from './names.js';
import { native } from './native.js';

/** A pool of huge pages of one size (/sys/kernel/mm/hugepages). */
export interface HugePagePool {
  /** Bytes of one page. */
  size: number;
  /** Pages in the pool. */
  total: number;
  /** Pages that nobody uses. */
  free: number;
}

/** What this machine, user and container can do. */
export interface Capabilities {
  /** Kernel release, as uname(2) gives it. */
  kernel: string;
  /** Whether a userfaultfd can be created here and now. */
  usable: boolean;
  /** Why not. */
  error?: UffdError;
  /** Which faults a userfaultfd that is created here sees: also those inside system calls, or those of user mode only. */
  faults?: 'all' | 'user';
  /** Features of the kernel. Empty where none can be created. */
  features: OrBit<Feature>[];
  /** Ioctls of a descriptor. Those of a range are told by registering it. */
  ioctls: OrBit<Ioctl>[];
  /** /dev/userfaultfd (Linux 6.1). */
  device: {
    /** Whether it is there. */
    exists: boolean;
    /** Whether this process may open it. */
    readable: boolean;
  };
  /** vm.unprivileged_userfaultfd; `undefined` where it does not exist. */
  unprivilegedUserfaultfd?: boolean;
  /** Whether this process has CAP_SYS_PTRACE: needed for `event-fork`, and for all faults without device and sysctl. */
  ptrace: boolean;
  /** Bytes of an ordinary page. */
  pageSize: number;
  /** Bytes of a transparent huge page; `undefined` where the kernel has none. */
  transparentHugePageSize?: number;
  /** Pools of huge pages, by size. */
  hugePages: HugePagePool[];
}

const DEVICE = '/dev/userfaultfd';
const POOLS = '/sys/kernel/mm/hugepages';
const CAP_SYS_PTRACE = 19n;

/**
 * What can be done here. Asks the kernel by throw-away descriptors, and never throws for lack of permission: it says so.
 *
 * @throws {@linkcode UffdError} `ERR_UFFD_UNSUPPORTED_PLATFORM`
 */
export function capabilities(): Capabilities {
  const factory = native().NativeFactory.open();
  const probe = factory.probe();
  const faults = probe.error ? undefined : seen(factory);
  // Not left to the garbage collector: it has a descriptor.
  factory.close();
  const sysctl = text('/proc/sys/vm/unprivileged_userfaultfd');
  const transparent = Number(text('/sys/kernel/mm/transparent_hugepage/hpage_pmd_size') ?? 0);
  return {
    kernel: release(),
    usable: !probe.error,
    ...(probe.error ? { error: fromNative(probe.error) } : {}),
    ...(faults === undefined ? {} : { faults }),
    features: probe.features as OrBit<Feature>[],
    ioctls: probe.ioctls as OrBit<Ioctl>[],
    device: { exists: existsSync(DEVICE), readable: readable(DEVICE) },
    ...(sysctl === undefined ? {} : { unprivilegedUserfaultfd: sysctl === '1' }),
    ptrace: hasPtrace(),
    pageSize: native().pageSize(),
    ...(transparent > 0 ? { transparentHugePageSize: transparent } : {}),
    hugePages: pools(),
  };
}

function seen(factory: NativeFactory): 'all' | 'user' {
  const made = factory.create({
    nonBlocking: true,
    closeOnExec: true,
    faults: 'all',
    require: [],
    prefer: [],
  });
  if (made.error) return 'user';
  native().closeUserfaultfd(made.handle, false);
  return 'all';
}

/** @hidden Whether this process has CAP_SYS_PTRACE, in effect. */
export function hasPtrace(): boolean {
  const mask = /^CapEff:\s*([0-9a-f]+)$/m.exec(text('/proc/self/status') ?? '')?.[1] ?? '0';
  return (BigInt(`0x${mask}`) & (1n << CAP_SYS_PTRACE)) !== 0n;
}

function pools(): HugePagePool[] {
  const names = existsSync(POOLS) ? readdirSync(POOLS) : [];
  return names
    .map(name => ({
      size: Number(/^hugepages-(\d+)kB$/.exec(name)?.[1] ?? 0) * 1024,
      total: Number(text(`${POOLS}/${name}/nr_hugepages`) ?? 0),
      free: Number(text(`${POOLS}/${name}/free_hugepages`) ?? 0),
    }))
    .toSorted((a, b) => a.size - b.size);
}

function readable(path: string): boolean {
  try {
    accessSync(path, constants.R_OK);
    return true;
  } catch {
    return false;
  }
}

function text(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return undefined;
  }
}
