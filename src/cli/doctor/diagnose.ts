/** What the facts mean, by role. A pure function: the same facts give the same diagnosis, wherever they come from. */

import { constants } from 'node:os';

import type { Outcome, Outcomes } from './attempts.js';
import type { Facts } from './facts.js';
import * as problems from './problems.js';
import type { Problem } from './problems.js';

/**
 * - `pager`: serves memory that other processes hand over with their userfaultfd. Needs no device and no privilege.
 * - `creator`: creates userfaultfds that see all faults: a VMM such as Firecracker, or a program that serves its own memory.
 */
export const ROLES = ['pager', 'creator'] as const;
export type Role = (typeof ROLES)[number];

/** What a role can do here. */
export interface RoleReport {
  usable: boolean;
  /** Of a creator that is not usable: whether it can at least see the faults of user mode of its own memory. */
  userFaults?: boolean;
  /** What is in the way, the true cause first. */
  problems: Problem[];
  /** What works less well than it could. */
  limits: Problem[];
}

export type Diagnosis = { [role in Role]: RoleReport };

const { EACCES, EINVAL, EMFILE, ENFILE, ENOSYS, EPERM } = constants.errno;
/** A session has a userfaultfd, a pidfd, and its image where it has one of its own. */
const DESCRIPTORS_PER_SESSION = 3;
/** Fewer sessions than this are no room to work in. */
const FEWEST_SESSIONS = 8;
/** Fewer than this are worth a word. */
const FEW_SESSIONS = 256;

/** What is missed where a feature is missing. In the order of how much it is missed. */
const FEATURES: readonly (readonly [name: string, since: string, without: string])[] = [
  ['event-remove', '4.11', 'memory that is given back (balloons) is not noticed'],
  ['missing-shmem', '4.11', 'memory of a memfd cannot be served'],
  ['poison', '6.6', 'lost pages cannot be poisoned, the process is killed instead'],
  ['minor-shmem', '5.14', "the mode 'minor' is not available"],
  ['wp-unpopulated', '6.4', 'writes to pages that are not there are not tracked'],
  ['wp-async', '6.7', 'writes are tracked by a fault each'],
  ['move', '6.8', 'pages cannot be moved'],
];

/** Says what each role can do, and what is in the way. */
export function diagnose(facts: Facts): Diagnosis {
  if (!facts.platform.startsWith('linux-')) return both(problems.platform(facts));
  if (facts.addon) return both(problems.addon(facts.addon));
  if (!facts.outcomes) throw new TypeError('Expected outcomes of a platform on which the addon loads');
  const features = missingFeatures(facts);
  return { pager: pager(facts, facts.outcomes, features), creator: creator(facts, facts.outcomes, features) };
}

function both(problem: Problem): Diagnosis {
  const report = (): RoleReport => ({ usable: false, problems: [problem], limits: [] });
  return { pager: report(), creator: report() };
}

function missingFeatures(facts: Facts): Problem[] {
  if (facts.features.length === 0) return []; // could not be asked for
  return FEATURES.filter(([name]) => !facts.features.includes(name)).map(missing =>
    problems.feature(facts, ...missing),
  );
}

function pager(facts: Facts, outcomes: Outcomes, limits: Problem[]): RoleReport {
  const found: Problem[] = [];
  const { soft, open } = facts.descriptors;
  const sessions = Math.max(0, Math.floor((soft - open) / DESCRIPTORS_PER_SESSION));
  if (sessions < FEWEST_SESSIONS) found.push(problems.descriptors(facts, sessions));
  if (!outcomes.pidfd.ok && !isExhausted(outcomes.pidfd)) found.push(problems.pidfd(facts, outcomes.pidfd));
  const few = sessions >= FEWEST_SESSIONS && sessions < FEW_SESSIONS;
  return {
    usable: found.length === 0,
    problems: found,
    limits: few ? [...limits, problems.descriptors(facts, sessions)] : limits,
  };
}

function creator(facts: Facts, outcomes: Outcomes, limits: Problem[]): RoleReport {
  if (outcomes.device.ok || outcomes.syscall.ok) return { usable: true, problems: [], limits };
  return { usable: false, userFaults: outcomes.user.ok, problems: inTheWay(facts, outcomes), limits };
}

/** What keeps it from being created. There are two ways, and either would do: the one that is nearer to work comes first. */
function inTheWay(facts: Facts, outcomes: Outcomes): Problem[] {
  if ([outcomes.device, outcomes.syscall, outcomes.user].some(isExhausted))
    return [problems.descriptors(facts)];
  if (isMissing(facts, outcomes)) return [problems.kernelWithout(facts)];
  const device = problems.device(facts, outcomes.device);
  const syscall = refusals(facts, outcomes);
  if (device === undefined) return syscall;
  // Who has the privilege, or the sysctl, needs no device: something takes away what would be permitted.
  return isPrivileged(facts) ? [...syscall, device] : [device, ...syscall];
}

function isExhausted(outcome: Outcome): boolean {
  return !outcome.ok && (outcome.errno === EMFILE || outcome.errno === ENFILE);
}

function isMissing({ built }: Facts, { syscall }: Outcomes): boolean {
  const shows = built.sysctl !== undefined || built.driver !== undefined || built.config === true;
  return !shows && !syscall.ok && syscall.errno === ENOSYS;
}

function isPrivileged({ ptrace, userNamespace, built }: Facts): boolean {
  return built.sysctl === true || (ptrace && !userNamespace);
}

/** Why userfaultfd(2) cannot be used. Who may see faults of user mode only can make the call: then nothing else refuses. */
function refusals(facts: Facts, { syscall, user }: Outcomes): Problem[] {
  if (user.ok) {
    if (!syscall.ok && syscall.errno === EPERM) return [problems.notPermitted(facts)];
    return [problems.syscall(syscall)];
  }
  const permission = isPrivileged(facts) ? [] : [problems.notPermitted(facts)];
  if (isFiltered(facts, user)) return [problems.seccomp(facts, user), ...permission];
  if (user.errno === EPERM || user.errno === EACCES) {
    // Every kernel since 5.11 lets everybody see the faults of user mode.
    const refused = facts.modules.some(name => ['selinux', 'apparmor', 'smack', 'tomoyo'].includes(name));
    return refused
      ? [problems.securityModule(facts, user), ...permission]
      : [problems.syscall(user), ...permission];
  }
  return permission.length > 0 ? permission : [problems.syscall(syscall)];
}

function isFiltered({ seccomp }: Facts, user: Outcome): boolean {
  if (user.ok) return false;
  // That the kernel has the call is known here; a sandbox without a filter of its own can hide it, too.
  return user.signal !== undefined || user.errno === ENOSYS || (seccomp && user.errno !== EINVAL);
}
