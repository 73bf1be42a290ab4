// The examples of handlers, each run as a person would.

import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import test from 'ava';
import { capabilities } from 'userfaultfd';

import { PEER } from '../examples/support/peer.js';
import { canRun } from './helpers/serving.js';

async function example(name: string): Promise<string> {
  const path = fileURLToPath(new URL(`../examples/${name}.js`, import.meta.url));
  const env = { ...process.env, UFFD_PEER: PEER };
  const { stdout } = await promisify(execFile)(process.execPath, [path], { timeout: 60_000, env });
  return stdout;
}

test('a collector moves pages when they are read, and remembers those that are written to', async t => {
  if (!canRun(t)) return;
  const output = await example('read-barrier');

  t.regex(output, /the sum is 2016$/m);
  t.regex(output, /64 pages were moved/);
  t.regex(output, /7 pages are remembered: (?=.*\b0\b)(?=.*\b10\b)(?=.*\b60\b)/);
});

test('a compressed file is decompressed where it is touched', async t => {
  if (!canRun(t)) return;
  const output = await example('lazy-file');

  t.regex(output, /^block 3 begins with 196608, 1 of 128 are there$/m);
  t.regex(output, /in 128 steps$/m);
  t.regex(output, /^it is the same$/m);
});

test('children that a process forks are followed', async t => {
  if (!canRun(t)) return;
  if (!capabilities().ptrace) {
    t.log('skipped: event-fork needs CAP_SYS_PTRACE');
    t.pass();
    return;
  }
  t.is(
    await example('forked-child'),
    [
      'the process reads 1 in its first page',
      'its first child reads 11 in the second',
      'its second child reads 12 in the third',
      'the process itself reads 1 there',
      'handlers ended: 1 11 12 (peer-exited)',
      '',
    ].join('\n'),
  );
});
