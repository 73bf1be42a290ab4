/**
 * What happens to a process whose memory cannot be served (its source failed, it did something that cannot be
 * followed, a limit was reached):
 *
 * - `'poison'`: every page still missing is poisoned; touching one is SIGBUS. On kernels that cannot poison (before
 *   6.6) the process is killed.
 * - `'kill'`: the process is killed with SIGKILL, through its pidfd.
 *
 * Zero pages are never given unasked.
 */
export type FailurePolicy = 'poison' | 'kill';

/** The policies there are. */
export const FAILURE_POLICIES: readonly FailurePolicy[] = ['poison', 'kill'];

/**
 * What a session that is closed on purpose does with pages that are still missing:
 *
 * - `'poison'`: touching one is SIGBUS from then on.
 * - `'populate'`: all of them are installed from the source first; what the source cannot give is poisoned.
 * - `'zero'`: they read zero.
 */
export type Rest = 'poison' | 'populate' | 'zero';

/** The ways to close there are. */
export const RESTS: readonly Rest[] = ['poison', 'populate', 'zero'];
