/** Processes from which ways to a userfaultfd are taken away. */

import { dirname, join } from 'node:path';

import { PEER } from '../../examples/support/peer.js';

/** `userfaultfd-confined ANSWER COMMAND…`: a seccomp filter answers userfaultfd(2) with this errno, or with `kill`. */
export const CONFINED: string = join(dirname(PEER), 'userfaultfd-confined');

/** A /dev without the device. */
export const NO_DEVICE =
  'mount -t tmpfs tmpfs /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9';

/** The command, after `setup` in a mount namespace of its own. */
export function afterSetup(setup: string, command: readonly string[]): [string, ...string[]] {
  const words = ['--mount', '--propagation', 'private', 'sh', '-ec', `${setup}\nexec "$@"`, 'sh'];
  return ['unshare', ...words, ...command];
}
