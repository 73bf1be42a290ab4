import { readdirSync } from 'node:fs';

import test from 'ava';
import { GiB } from 'userfaultfd';

import { canRun, nextRejection, PAGE, resources, serving } from './helpers/serving.js';

const NOBODY = 65_534;
const region = (fields: string): string =>
  `[{"base_host_virt_addr":{base0},"size":{size0},"offset":0${fields}}]`;

/** Without a userfaultfd there is no memory that could wait. */
const NOTHING_HANDED_OVER = new Set<string>([
  'without a descriptor',
  'whose descriptor is /dev/null',
  'whose descriptor is a pipe',
  'whose userfaultfd never had its API handshake',
]);
/** Well-formed, and not to be served. */
const SAID_WHICH = new Set<string>(['that reaches past the image']);

for (const [what, code, ...args] of [
  ['that is no JSON', 'ERR_UFFD_PROTOCOL', '--json', 'GET / HTTP/1.1'],
  ['of another shape', 'ERR_UFFD_PROTOCOL', '--json', '{"regions":[]}'],
  ['without regions', 'ERR_UFFD_PROTOCOL', '--json', '[]'],
  ['without a descriptor', 'ERR_UFFD_PROTOCOL', '--fd', 'none'],
  ['whose descriptor is /dev/null', 'ERR_UFFD_PROTOCOL', '--fd', 'null'],
  ['whose descriptor is a pipe', 'ERR_UFFD_PROTOCOL', '--fd', 'pipe'],
  ['whose userfaultfd never had its API handshake', 'ERR_UFFD_PROTOCOL', '--fd', 'no-api'],
  ['whose connection is closed halfway', 'ERR_UFFD_PROTOCOL', '--hang-up-after', '20'],
  [
    'with an empty region',
    'ERR_UFFD_REGION',
    '--json',
    '[{"base_host_virt_addr":{base0},"size":0,"offset":0}]',
  ],
  [
    'with an unaligned address',
    'ERR_UFFD_REGION',
    '--json',
    '[{"base_host_virt_addr":12345,"size":4096,"offset":0}]',
  ],
  [
    'with an unaligned size',
    'ERR_UFFD_REGION',
    '--json',
    '[{"base_host_virt_addr":{base0},"size":100,"offset":0}]',
  ],
  [
    'with an unaligned offset',
    'ERR_UFFD_REGION',
    '--json',
    '[{"base_host_virt_addr":{base0},"size":4096,"offset":9}]',
  ],
  [
    'with an address that overflows',
    'ERR_UFFD_REGION',
    '--json',
    '[{"base_host_virt_addr":18446744073709547520,"size":4096,"offset":0}]',
  ],
  [
    'with an offset that overflows',
    'ERR_UFFD_REGION',
    '--json',
    '[{"base_host_virt_addr":{base0},"size":4096,"offset":18446744073709547520}]',
  ],
  [
    'that reaches past the image',
    'ERR_UFFD_REGION',
    '--json',
    region('').replace('"offset":0', `"offset":${GiB}`),
  ],
  [
    'whose regions overlap',
    'ERR_UFFD_REGION',
    '--json',
    '[{"base_host_virt_addr":{base0},"size":8192,"offset":0},{"base_host_virt_addr":{base0},"size":4096,"offset":8192}]',
  ],
  ['with pages of 1 GiB', 'ERR_UFFD_UNSUPPORTED', '--json', region(`,"page_size":${GiB}`)],
  ['with pages of no power of two', 'ERR_UFFD_UNSUPPORTED', '--json', region(',"page_size_kib":5000')],
] as const) {
  test(`a handshake ${what} is rejected, and the server goes on`, async t => {
    if (!canRun(t)) return;
    const { server, start, connect, bytes } = await serving(t);
    const before = readdirSync('/proc/self/fd').length;
    const bad = start('--region', `${4 * PAGE}`, ...args);

    const rejection = await nextRejection(server);

    t.is(rejection.error.code, code, rejection.error.message);
    t.is(rejection.peer?.pid, bad.pid);
    if (NOTHING_HANDED_OVER.has(what)) {
      t.is(readdirSync('/proc/self/fd').length - before, 3, 'only the three pipes to the peer are new');
    } else if (SAID_WHICH.has(what)) {
      t.is(readdirSync('/proc/self/fd').length - before, 3, 'only the three pipes to the peer are new');
      await bad.ready();
      t.is((await bad.ask('probe', 0)).result, 'efault', 'its memory is poisoned');
    } else {
      t.is((await bad.ended).signal, 'SIGKILL', 'nobody knows which of its memory waits');
      t.is(readdirSync('/proc/self/fd').length, before);
    }
    const { peer } = await connect();
    t.is((await peer.ask('read', 0, 32)).hex, bytes.subarray(0, 32).toString('hex'));
  });
}

test('a handshake that is never completed is rejected in time', async t => {
  if (!canRun(t)) return;
  const { server, start } = await serving(t, { handshakeTimeout: 200 });

  start('--region', `${PAGE}`, '--json', '[{"base_host_virt_addr":');

  t.is((await nextRejection(server)).error.code, 'ERR_UFFD_TIMEOUT');
});

test('connections beyond maxSessions are rejected, and accepted again when one has ended', async t => {
  if (!canRun(t)) return;
  const { server, connect, start } = await serving(t, { maxSessions: 1 });
  const first = await connect();

  start('--region', `${PAGE}`);
  t.is((await nextRejection(server)).error.code, 'ERR_UFFD_EXHAUSTED');

  first.peer.kill();
  await first.session.closed;
  const second = await connect();
  t.is((await second.peer.ask('probe', 0)).result, 'ok');
});

test('a process of another user than the one allowed is rejected', async t => {
  if (process.getuid?.() !== 0) {
    t.log('skipped: only root can give a socket to another user');
    t.pass();
    return;
  }
  const { server, start } = await serving(t, { peer: { uid: NOBODY } });

  start('--region', `${PAGE}`);

  const { error, peer } = await nextRejection(server);
  t.is(error.code, 'ERR_UFFD_PEER_NOT_ALLOWED', error.message);
  t.is(peer, undefined);
});

test('hundreds of bad connections leave no descriptor and no thread behind', async t => {
  if (!canRun(t)) return;
  const { server, start } = await serving(t);
  const before = resources();
  let rejected = 0;
  server.on('rejected', ({ dropped }) => (rejected += 1 + dropped));

  for (let round = 0; round < 20; round += 1) {
    const next = nextRejection(server);
    const peer = start('--region', `${PAGE}`, '--fd', 'null');
    await next;
    peer.kill();
    await peer.ended;
  }

  t.is(rejected, 20);
  t.deepEqual(resources().fds.length, before.fds.length);
  t.deepEqual(resources().threads, before.threads);
});
