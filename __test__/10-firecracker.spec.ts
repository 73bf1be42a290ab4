import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';

import test from 'ava';
import { KiB, MiB } from 'userfaultfd';

import {
  canRun,
  counted,
  IMAGE_SIZE,
  nextRejection,
  PAGE,
  reserveHugePages,
  serving,
} from './helpers/serving.js';

const sha256 = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

test('every page the process reads equals the image, in regions that are not in address order', async t => {
  if (!canRun(t)) return;
  const { connect, bytes } = await serving(t);
  const first = 3 * MiB + 5 * PAGE;
  const { peer, ready, session } = await connect(
    '--region',
    `${first}`,
    '--region',
    `${IMAGE_SIZE - first}`,
    '--reverse',
  );

  await peer.ask('touch', 'order=random', 'seed=1');

  t.is((await peer.ask('hash')).sha256, sha256(bytes));
  t.is(ready.resident, 0);
  t.is(session.peer.pid, peer.pid);
  t.deepEqual(
    session.regions.map(region => [region.address, region.length, region.sourceOffset]),
    ready.regions
      .toSorted((a, b) => Number(BigInt(a.base) - BigInt(b.base)))
      .map(region => [BigInt(region.base), region.size, region.offset]),
  );
  t.is((await counted(session, IMAGE_SIZE / PAGE)).pagesInstalled, IMAGE_SIZE / PAGE);
});

test('a fault brings 64 KiB, so that a whole image takes a twelfth of the faults at most', async t => {
  if (!canRun(t)) return;
  const { connect } = await serving(t);
  const { peer, session } = await connect();

  await peer.ask('touch', 'order=random', 'seed=2');

  t.true(session.stats().faults <= IMAGE_SIZE / PAGE / 12, `${session.stats().faults} faults`);
});

test('a window of one page brings nothing but the page', async t => {
  if (!canRun(t)) return;
  const { connect } = await serving(t, { window: 4 * KiB });
  const { peer, session } = await connect();

  await peer.ask('read', 8 * PAGE, 16);

  t.is((await counted(session, 1)).pagesInstalled, 1);
  t.is((await peer.ask('resident')).pages, 1);
});

for (const fields of ['v1.1', 'v1.7', 'v1.12']) {
  test(`the handshake of Firecracker ${fields} is understood`, async t => {
    if (!canRun(t)) return;
    const { connect, bytes } = await serving(t);
    const { peer } = await connect('--fields', fields);

    t.is((await peer.ask('read', PAGE, 64)).hex, bytes.subarray(PAGE, PAGE + 64).toString('hex'));
  });
}

for (const [what, ...args] of [
  ['in pieces, the descriptor with the third', '--pieces', '5', '--fd-piece', '2'],
  ['in pieces, the descriptor with the first', '--pieces', '7', '--fd-piece', '0'],
  ['with a surplus descriptor', '--fd', 'two'],
  ['with unknown fields', '--extra-field'],
  ['with bytes behind the array', '--trailing', '{"next":1}'],
  ['with a blocking descriptor', '--fd', 'blocking'],
  ['on a connection closed right after it', '--close'],
] as const) {
  test(`a handshake ${what} is accepted`, async t => {
    if (!canRun(t)) return;
    const { connect, bytes } = await serving(t);
    const { peer } = await connect(...args);

    t.is(
      (await peer.ask('read', 5 * PAGE + 100, 64)).hex,
      bytes.subarray(5 * PAGE + 100, 5 * PAGE + 164).toString('hex'),
    );
  });
}

test('memory given back reads zero for ever, and what was kept is still the image', async t => {
  if (!canRun(t)) return;
  const { connect, memory } = await serving(t);
  const { peer, session } = await connect();
  await peer.ask('touch', 'order=random', 'seed=3', 'limit=400');

  const removed = await peer.ask('discard-random', 'seed=3', 'count=20', 'pages=13');
  const first = await peer.ask('zeros');
  await peer.ask('discard-random', 'seed=3', 'count=20', 'pages=13');
  const second = await peer.ask('zeros');

  t.true(removed.pages > 0);
  t.deepEqual([first.nonzero, second.nonzero], [0, 0]);
  t.is((await peer.ask('compare', memory)).different, 0);
  t.true(session.stats().pagesRemoved >= removed.pages);
});

test('a page given back before it was ever touched reads zero, its neighbours the image', async t => {
  if (!canRun(t)) return;
  const { connect, memory } = await serving(t);
  const { peer } = await connect();

  await peer.ask('discard', 17 * PAGE, 3 * PAGE);

  t.is((await peer.ask('read', 18 * PAGE, 8)).hex, '0000000000000000');
  t.is((await peer.ask('zeros')).nonzero, 0);
  t.is((await peer.ask('compare', memory)).different, 0);
});

test('two processes are served at once, each with its own content', async t => {
  if (!canRun(t)) return;
  const { connect, bytes } = await serving(t);
  const one = await connect();
  const two = await connect('--region', `${2 * MiB}:${4 * MiB}`);

  await Promise.all([
    one.peer.ask('touch', 'order=random', 'seed=4', 'threads=2'),
    two.peer.ask('touch', 'order=random', 'seed=5'),
  ]);

  t.is((await one.peer.ask('hash')).sha256, sha256(bytes));
  t.is((await two.peer.ask('hash')).sha256, sha256(bytes.subarray(4 * MiB, 6 * MiB)));
  t.not(one.session.id, two.session.id);
});

test('many threads that fault on the same pages all go on', async t => {
  if (!canRun(t)) return;
  const { connect, bytes } = await serving(t);
  const { peer } = await connect();

  await peer.ask('touch', 'order=sequential', 'threads=8');

  t.is((await peer.ask('hash')).sha256, sha256(bytes));
});

test('huge pages are installed whole, and read zero when given back', async t => {
  if (!canRun(t) || !reserveHugePages(t, 4)) return;
  const size = 6 * MiB;
  const { connect, bytes } = await serving(t, { size });
  const { peer, session } = await connect('--page-size', `${2 * MiB}`);

  await peer.ask('touch', 'order=random', 'seed=6');

  t.is(session.pageSize, 2 * MiB);
  t.is((await peer.ask('hash')).sha256, sha256(bytes));
  t.is((await counted(session, 3)).pagesInstalled, 3);
  await peer.ask('discard', 2 * MiB, 2 * MiB);
  t.is((await peer.ask('zeros')).nonzero, 0);
});

test('an empty pool of huge pages ends the session by name instead of spinning', async t => {
  if (!canRun(t) || !reserveHugePages(t, 1)) return;
  const { connect } = await serving(t, { size: 4 * MiB, onFailure: 'kill' });
  const { peer, session } = await connect('--page-size', `${2 * MiB}`);

  peer.send('touch');

  const end = await session.closed;
  t.is(end.reason, 'exhausted');
  t.is(end.error?.code, 'ERR_UFFD_EXHAUSTED');
  t.is((await peer.ended).signal, 'SIGKILL');
});

test('an image with more than the regions is served; one with less is refused', async t => {
  if (!canRun(t)) return;
  const { connect, start, server, bytes } = await serving(t);
  const { peer } = await connect('--region', `${MiB}:${MiB}`);
  t.is((await peer.ask('hash')).sha256, sha256(bytes.subarray(MiB, 2 * MiB)));

  start('--region', `${8 * MiB}`);

  t.is((await nextRejection(server)).error.code, 'ERR_UFFD_REGION');
});

test('an image that is not in the page cache is read by workers, and content is right all the same', async t => {
  if (!canRun(t)) return;
  const { connect, memory, bytes } = await serving(t);
  // Writes the file back, then drops it from the cache.
  spawnSync('dd', [`of=${memory}`, 'oflag=nocache', 'conv=notrunc,fdatasync', 'count=0', 'status=none']);
  const { peer, session } = await connect();

  await peer.ask('touch', 'order=random', 'threads=4');

  t.is((await peer.ask('hash')).sha256, sha256(bytes));
  if (session.stats().workerReads === 0)
    t.log('skipped: the folder for temporary files is memory, nothing is ever read from a disk');
});

test('pages given back while their bytes are on the way from the disk read zero', async t => {
  if (!canRun(t)) return;
  const { connect, memory } = await serving(t);
  spawnSync('dd', [`of=${memory}`, 'oflag=nocache', 'conv=notrunc,fdatasync', 'count=0', 'status=none']);
  const { peer } = await connect();

  for (let round = 0; round < 20; round += 1) {
    // Half of each window is given back right after a thread has asked for the other half.
    peer.send('read', round * 16 * PAGE, 8);
    peer.send('discard', (round * 16 + 8) * PAGE, 8 * PAGE);
  }
  for (let round = 0; round < 40; round += 1) {
    await peer.answer();
  }

  t.is((await peer.ask('zeros')).nonzero, 0);
  t.is((await peer.ask('compare', memory)).different, 0);
});

test('one fault brings 64 KiB, and more only where many have been', async t => {
  if (!canRun(t)) return;
  const { connect } = await serving(t, { size: 32 * MiB });
  const { peer, session } = await connect();

  await peer.ask('read', 20 * MiB, 8);
  t.is((await counted(session, 16)).pagesInstalled, 16);
  await peer.ask('touch', 'order=sequential', 'limit=4096');

  const { faults, pagesInstalled } = await counted(session, 17);
  t.true(faults < pagesInstalled / 16 / 2, `${faults} faults for ${pagesInstalled} pages`);
});
