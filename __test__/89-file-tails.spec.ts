// Files that end inside of a page are served to their last byte, and zeros behind it, as a mapping of them has.

import { randomBytes } from 'node:crypto';
import { truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import { fileSource, layeredSource, MemoryMapping, overlaySource, Pager, Trace } from 'userfaultfd';

import { canRun, folder, PAGE, serving } from './helpers/serving.js';

const PAGES = 20;
/** The last page has this many bytes of the file. */
const REST = 1234;
const SIZE = (PAGES - 1) * PAGE + REST;

function file(t: ExecutionContext): { path: string; bytes: Buffer } {
  const path = join(folder(t), 'image');
  const bytes = randomBytes(SIZE);
  writeFileSync(path, bytes);
  return { path, bytes };
}

/** The file, and zeros up to the end of its last page. */
const whole = (bytes: Buffer): Buffer => Buffer.concat([bytes], PAGES * PAGE);

for (const [name, source] of [
  ['a file', (path: string) => fileSource(path)],
  ['a file past the page cache', (path: string) => fileSource(path, { direct: true })],
  ['a file below others', (path: string) => layeredSource(overlaySource(fileSource(path), []), [])],
] as const) {
  test(`${name} that ends inside of a page is served to its last byte, with zeros behind it`, async t => {
    if (!canRun(t)) return;
    const { path, bytes } = file(t);
    const pager = Pager.create();
    t.teardown(async () => pager.close());
    for (const populate of [false, true]) {
      const mapping = MemoryMapping.anonymous(PAGES * PAGE);
      const session = await pager.serve(mapping, { source: source(path) });
      if (populate) await session.populate();
      t.deepEqual(await mapping.read(SIZE - 8, PAGE - REST + 8), whole(bytes).subarray(SIZE - 8));
      t.deepEqual(await mapping.read(0, PAGES * PAGE), whole(bytes));
      await session.close();
      mapping.close();
    }
  });
}

test('a page more than a file that ends inside of a page has is refused as ever', async t => {
  if (!canRun(t)) return;
  const pager = Pager.create();
  t.teardown(async () => pager.close());
  const mapping = MemoryMapping.anonymous((PAGES + 1) * PAGE);

  await t.throwsAsync(pager.serve(mapping, { source: fileSource(file(t).path) }), {
    code: 'ERR_UFFD_REGION',
  });

  mapping.close();
});

test('a file that loses the end of its last page fails its session, and gives no zeros for it', async t => {
  if (!canRun(t)) return;
  const { path } = file(t);
  const { peer, session } = await (await serving(t, { memory: path })).connect('--region', `${PAGES * PAGE}`);
  truncateSync(path, SIZE - 1);

  t.is((await peer.ask('probe', (PAGES - 1) * PAGE)).result, 'efault');

  t.like(await session.closed, { reason: 'source-failed' });
});

test('what was recorded of a file that ends inside of a page is replayed, to its last page', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = file(t);
  const record = join(folder(t), 'run.trace');
  const pager = Pager.create();
  t.teardown(async () => pager.close());
  const first = MemoryMapping.anonymous(PAGES * PAGE);
  const recorded = await pager.serve(first, { source: fileSource(path), record });
  await first.read((PAGES - 1) * PAGE, 1);
  await recorded.stopRecording();

  const second = MemoryMapping.anonymous(PAGES * PAGE);
  const replaying = await pager.serve(second, { source: fileSource(path), replay: await Trace.read(record) });
  await replaying.replayed();

  const { faults } = replaying.stats();
  t.deepEqual(await second.read((PAGES - 1) * PAGE, PAGE), whole(bytes).subarray((PAGES - 1) * PAGE));
  t.is(replaying.stats().faults, faults, 'it was there');
  await pager.close();
  first.close();
  second.close();
});
