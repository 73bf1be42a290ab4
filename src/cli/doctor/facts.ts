/** What can be found out about this machine, user and container, with what comes of trying. Nothing is judged here. */

import { capabilities } from '../../capabilities.js';
import { UffdError } from '../../errors.js';
import { native } from '../../native.js';
import { attemptAll, type Outcomes } from './attempts.js';
import { lookAround } from './surroundings.js';

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

/** Finds out; where somebody has looked around before, only the rest. */
export function collectFacts(seen: Facts = lookAround()): Facts {
  const facts = { ...seen };
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
