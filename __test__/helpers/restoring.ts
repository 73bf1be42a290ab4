/** Restores against a Firecracker that behaves as a test wants, and what they may leave behind: nothing. */

import { existsSync, readdirSync } from 'node:fs';

import type { ExecutionContext } from 'ava';
import { restoreFirecracker, type RestoreOptions, UffdError } from 'userfaultfd';

import { FakeFirecracker, NO_CONTENT } from './firecracker.js';
import { folder, image, resources } from './serving.js';

/** A Firecracker, an image, and a folder for temporary files that has to be empty in the end. */
export async function prepared(
  t: ExecutionContext,
  jailRoot?: string,
): Promise<{ firecracker: FakeFirecracker; options: RestoreOptions; bytes: Buffer; temporary: string }> {
  const firecracker = await FakeFirecracker.start(t, jailRoot);
  const { path: memory, bytes } = image(t);
  const options = { apiSocket: firecracker.apiSocket, state: '/snapshots/vm.state', memory };
  const temporary = folder(t);
  const before = process.env['TMPDIR'];
  process.env['TMPDIR'] = temporary;
  t.teardown(() => {
    if (before === undefined) delete process.env['TMPDIR'];
    else process.env['TMPDIR'] = before;
  });
  return { firecracker, options, bytes, temporary };
}

/** How many pages are there when the VM is resumed; -1 before that. */
export function residentWhenResumed(firecracker: FakeFirecracker): () => number {
  let resident = -1;
  firecracker.onState = async () => {
    resident = (await firecracker.peer.ask('resident')).pages;
    return NO_CONTENT;
  };
  return () => resident;
}

/** What a restore has left in the folder for temporary files; the tests' own folders have other names. */
export function leftIn(temporary: string): string[] {
  return readdirSync(temporary).filter(name => !name.startsWith('userfaultfd-'));
}

/** Threads of the package that stay. */
export function lasting(): string[] {
  // Threads that open images stay a moment, for the next one.
  return resources().threads.filter(name => name !== 'uffd-job');
}

/** Restores, which has to fail; then nothing may be left of it. */
export async function refusal(
  t: ExecutionContext,
  { options, temporary }: { options: RestoreOptions; temporary: string },
): Promise<UffdError> {
  const before = lasting();
  const error = await t.throwsAsync(restoreFirecracker(options), { instanceOf: UffdError });
  t.deepEqual(lasting(), before, 'no thread');
  t.deepEqual(leftIn(temporary), [], 'no socket, no folder');
  if (options.socketPath !== undefined) t.false(existsSync(options.socketPath));
  return error;
}

/** Never. */
export async function silence(): Promise<undefined> {
  return new Promise(() => {});
}
