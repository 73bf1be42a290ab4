// Overlays: bytes of one session's own over a memory image that many share.

import test from 'ava';
import {
  bufferSource,
  MemoryMapping,
  type Overlay,
  Pager,
  restoreFirecracker,
  type RestoreOptions,
} from 'userfaultfd';

import { mapped, PAGE, pageOf } from './helpers/faults.js';
import { FakeFirecracker } from './helpers/firecracker.js';
import { canRun, image, serving } from './helpers/serving.js';

const PAGES = 4;

/** The image of one clone. */
function clone(bytes: Buffer, { offset, data }: { offset: number; data: Buffer }): Buffer {
  const own = Buffer.from(bytes);
  data.copy(own, offset);
  return own;
}

test('mappings served from one source have their own bytes', async t => {
  if (!canRun(t)) return;
  const bytes = pageOf(9, PAGES);
  const source = bufferSource(bytes);
  await using pager = Pager.create();
  for (const name of ['first', 'second']) {
    const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
    const overlay = { offset: 2 * PAGE - 3, data: Buffer.from(name) };

    const session = await pager.serve(mapping, { source, overlays: [overlay] });

    t.true(clone(bytes, overlay).equals(await mapping.read(0, PAGES * PAGE)), name);
    await session.close({ rest: 'zero' });
  }
});

test('clones behind one socket have their own bytes over a file that all share', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t);
  let clones = 0;
  const { connect } = await serving(t, {
    memory: () => {
      clones += 1;
      return { memory: path, overlays: [{ offset: 16, data: Buffer.from(`clone ${clones}`) }] };
    },
  });

  for (const number of [1, 2]) {
    const { peer } = await connect();
    const { hex } = await peer.ask('read', 0, 32);
    const own = clone(bytes, { offset: 16, data: Buffer.from(`clone ${number}`) });
    t.is(hex, own.subarray(0, 32).toString('hex'));
  }
});

test('a restored VM has its own bytes', async t => {
  if (!canRun(t)) return;
  const firecracker = await FakeFirecracker.start(t);
  const { path: memory, bytes } = image(t);
  const overlay = { offset: 16, data: Buffer.from('10.0.0.7') };

  await using vm = await restoreFirecracker({
    apiSocket: firecracker.apiSocket,
    state: '/snapshots/vm.state',
    memory,
    overlays: [overlay],
  });

  const { hex } = await firecracker.peer.ask('read', 0, 32);
  t.is(hex, clone(bytes, overlay).subarray(0, 32).toString('hex'));
  t.is(vm.session.stats().faultsPoisoned, 0);
});

test('overlays that cannot be are refused, and leave the mapping as it was', async t => {
  if (!canRun(t)) return;
  const source = bufferSource(pageOf(9, PAGES));
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  await using pager = Pager.create();
  const beyond: Overlay[] = [{ offset: PAGES * PAGE - 1, data: new Uint8Array(2) }];

  await t.throwsAsync(pager.serve(mapping, { source, overlays: beyond }), { code: 'ERR_UFFD_SOURCE' });
  await t.throwsAsync(pager.serve(mapping, { source, overlays: {} as never }), {
    code: 'ERR_INVALID_ARG_TYPE',
  });
  const given: RestoreOptions = {
    apiSocket: '/run/none.sock',
    state: '/snapshots/vm.state',
    memory: () => '/snapshots/vm.mem',
    overlays: [],
  };
  const error = await t.throwsAsync(restoreFirecracker(given), { code: 'ERR_INVALID_ARG_VALUE' });
  t.regex(error?.message ?? '', /`options.overlays`.*function/);

  await using session = await pager.serve(mapping, { source, overlays: [] });
  t.true(pageOf(9).equals(await mapping.read(0, PAGE)));
  await session.close({ rest: 'zero' });
});
