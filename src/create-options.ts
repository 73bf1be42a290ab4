import type { NativeCreateOptions } from '#native';

import { type Feature, FEATURES } from './names.js';
import { validateBoolean, validateNames, validateOneOf, validateOptions } from './validate.js';

/** What is wanted of a new userfaultfd. */
export interface CreateOptions {
  /** Reading does not wait (`O_NONBLOCK`); without it the descriptor cannot be polled. Default: `true`. */
  nonBlocking?: boolean;
  /** Closed by exec (`O_CLOEXEC`). Default: `true`. */
  closeOnExec?: boolean;
  /**
   * Which faults it sees: `'all'` (also those inside system calls; needs the device, CAP_SYS_PTRACE, or
   * vm.unprivileged_userfaultfd=1), `'user'` (those of user mode; anybody may), or `'permitted'`: all where that is
   * permitted, else those of user mode. Default: `'permitted'`.
   */
  faults?: 'permitted' | 'all' | 'user';
  /** Features without which it is of no use. Default: none. */
  require?: readonly Feature[];
  /** Features to have where the kernel has them and they are permitted. Default: none. */
  prefer?: readonly Feature[];
  /**
   * Has faults tell the thread that waits (the feature `thread-id`), where the kernel can: without it a handler does not know a
   * fault of its own thread at once. `false`: only if it is named in `require` or `prefer`. Default: `true`.
   */
  threadId?: boolean;
}

/** How a userfaultfd is closed. */
export interface UserfaultfdCloseOptions {
  /** What threads get that wait for a page: SIGBUS (Linux 6.6), or zeros. Default: closing is refused. */
  waiting?: 'poison' | 'zero';
}

/** @hidden */
export function readCreateOptions(options: CreateOptions): NativeCreateOptions {
  validateOptions('options', options, [
    'nonBlocking',
    'closeOnExec',
    'faults',
    'require',
    'prefer',
    'threadId',
  ]);
  const prefer = validateNames('options.prefer', options.prefer, FEATURES);
  return {
    nonBlocking: validateBoolean('options.nonBlocking', options.nonBlocking, true),
    closeOnExec: validateBoolean('options.closeOnExec', options.closeOnExec, true),
    faults: validateOneOf('options.faults', options.faults ?? 'permitted', ['permitted', 'all', 'user']),
    require: validateNames('options.require', options.require, FEATURES),
    prefer: validateBoolean('options.threadId', options.threadId, true) ? [...prefer, 'thread-id'] : prefer,
  };
}
