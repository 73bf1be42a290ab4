import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';

import test from 'ava';

import { PEER } from '../examples/support/peer.js';
import { canRun } from './helpers/serving.js';

const RESTORE = fileURLToPath(new URL('../examples/restore.js', import.meta.url));
const NOBODY = 65_534;

function restore(options: object): { status: number | null; output: string } {
  const env = { ...process.env, UFFD_PEER: PEER };
  const { status, stdout, stderr } = spawnSync(process.execPath, [RESTORE], {
    encoding: 'utf8',
    timeout: 90_000,
    env,
    ...options,
  });
  return { status, output: `${stdout}${stderr}` };
}

test('the main job restores an image, says what a person wants to know, and ends with status 0', t => {
  if (!canRun(t)) return;

  const { status, output } = restore({});

  t.is(status, 0, output);
  for (const line of [
    /^placement +\S/m,
    /^restoring: 100 % \(256 MiB\), \d+ faults/m,
    /^first access +after [\d.]+ ms; reading the whole file first takes \d+ ms/m,
    /^whole image +\d+ ms in random order, \d+ MiB\/s/m,
    /^faults +\d+, \d+\.\d pages each/m,
    /^64 KiB and more +[\d.]+x faster/m,
    /^ok +memory before the first touch: 0 of 65536 pages resident/m,
    /^ok +SHA-256 of what the process read equals that of the image/m,
    /^ok +\d+ pages given back .* all read zero/m,
  ]) {
    t.regex(output, line);
  }
});

test('without the privilege the main job says exactly what is missing and how to get it', t => {
  if (process.getuid?.() !== 0) {
    t.log('skipped: only root can become another user');
    t.pass();
    return;
  }

  const { status, output } = restore({ uid: NOBODY, gid: NOBODY });

  t.is(status, 1, output);
  t.regex(output, /uid 65534\) may not create a userfaultfd/);
  t.regex(output, /\/dev\/userfaultfd (is mode 0600, owner 0|does not exist)/);
  t.regex(output, /vm\.unprivileged_userfaultfd is 0/);
  t.regex(output, /setfacl -m u:65534:r/);
});
