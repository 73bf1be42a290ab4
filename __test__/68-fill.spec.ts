// `mode: 'fill'`: everything is there before anybody hears of the session.

import { setImmediate } from 'node:timers/promises';

import test from 'ava';
import {
  bufferSource,
  callbackSource,
  KiB,
  MemoryMapping,
  Pager,
  type PageSource,
  restoreFirecracker,
  type RestoreMode,
  serveFirecracker,
} from 'userfaultfd';

import { handedOver } from './helpers/adopting.js';
import { mapped, PAGE, pageOf } from './helpers/faults.js';
import { leftIn, prepared, residentWhenResumed, silence } from './helpers/restoring.js';
import { canRun, folder, image, IMAGE_SIZE, nextRejection, serving } from './helpers/serving.js';
import { Peer } from '../examples/support/peer.js';

const PAGES = 200;

/** A source that gives nothing before it is told to, and tells when it is asked. */
function gated(): { source: PageSource; asked: Promise<void>; open: () => void } {
  let open = (): void => {};
  let ask = (): void => {};
  const opened = new Promise<void>(resolve => {
    open = resolve;
  });
  const asked = new Promise<void>(resolve => {
    ask = resolve;
  });
  const give = async (_: number, length: number): Promise<Uint8Array> => {
    ask();
    await opened;
    return Buffer.alloc(length, 7);
  };
  return { source: callbackSource(give, { size: PAGES * PAGE, chunk: PAGE }), asked, open };
}

const present = (mapping: MemoryMapping): number =>
  mapping.residency().filter(state => state === 'present').length;

test('a mapping that is filled is all there when it is served', async t => {
  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  await using pager = Pager.create();

  const session = await pager.serve(mapping, { source: bufferSource(pageOf(7, PAGES)), mode: 'fill' });

  t.is(present(mapping), PAGES);
  t.is(session.mode, 'fill');
  const { faults, pagesPrefetched } = session.stats();
  t.deepEqual([faults, pagesPrefetched], [0, PAGES]);
  t.true(pageOf(7, PAGES).equals(await mapping.read(0, PAGES * PAGE)));
  const other = mapped(t, MemoryMapping.anonymous(PAGE));
  t.is((await pager.serve(other, { source: bufferSource(pageOf(7)) })).mode, 'windows');
  t.is(present(other), 0);
});

test('until it is full a session is not there, and who touches it is answered', async t => {
  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  const { source, asked, open } = gated();
  await using pager = Pager.create();

  const serve = pager.serve(mapping, { source, mode: 'fill' });
  await asked;
  t.is(pager.sessions.length, 0);
  const read = mapping.read((PAGES - 1) * PAGE, 4);
  open();

  t.deepEqual([...(await read)], [7, 7, 7, 7]);
  await serve;
  t.is(pager.sessions.length, 1);
  t.is(present(mapping), PAGES);
});

test('a filling that fails is the error of the call, with its cause, and what is missing is poisoned', async t => {
  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  const reason = new Error('nothing there');
  const source = callbackSource(async () => Promise.reject(reason), { size: PAGES * PAGE });
  await using pager = Pager.create();

  const error = await t.throwsAsync(pager.serve(mapping, { source, mode: 'fill' }), {
    code: 'ERR_UFFD_SOURCE',
  });

  t.is(error?.cause, reason);
  t.is(pager.sessions.length, 0);
  t.true(mapping.residency().every(state => state === 'noted'));
});

test('a pager that is closed meanwhile does not wait for the rest', async t => {
  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  const { source, asked } = gated();
  const pager = Pager.create();
  const serve = t.throwsAsync(pager.serve(mapping, { source, mode: 'fill' }), {
    code: 'ERR_UFFD_USE_AFTER_CLOSE',
    message: /closed before all of the memory was there/,
  });
  await asked;

  await pager.close({ rest: 'zero' });

  await serve;
  t.is(present(mapping), 0);
});

test('who gives up waiting for a session gets its reason, and what is missing is poisoned', async t => {
  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  const { source, asked } = gated();
  await using pager = Pager.create();
  const controller = new AbortController();
  const reason = new Error('no longer wanted');

  const serve = pager.serve(mapping, { source, mode: 'fill', signal: controller.signal });
  await asked;
  controller.abort(reason);

  t.is(await t.throwsAsync(serve), reason);
  t.is(await t.throwsAsync(pager.serve(mapping, { source, signal: controller.signal })), reason);
  await pager.close();
  t.true(mapping.residency().every(state => state === 'noted'));
});

test('memory that was handed over is filled before it is a session', async t => {
  if (!canRun(t)) return;
  const { path, bytes } = image(t, 64 * PAGE);
  const { peer, uffd, pidfd, regions } = await handedOver(t, `--region ${64 * PAGE}`);
  await using pager = Pager.create();

  const session = await pager.adopt(uffd, { source: bufferSource(bytes), regions, pidfd, mode: 'fill' });

  t.is((await peer.ask('resident')).pages, 64);
  t.is((await peer.ask('compare', path)).different, 0);
  t.is(session.stats().faults, 0);
});

test('a process that exits while it is filled is no session', async t => {
  if (!canRun(t)) return;
  const { peer, uffd, pidfd, regions } = await handedOver(t, `--region ${PAGES * PAGE}`);
  const { source, asked } = gated();
  await using pager = Pager.create();
  const adopt = t.throwsAsync(pager.adopt(uffd, { source, regions, pidfd, mode: 'fill' }), {
    code: 'ERR_UFFD_CLOSED',
  });
  await asked;

  peer.kill();

  await adopt;
  t.is(pager.sessions.length, 0);
});

test('a server tells of processes when they are full', async t => {
  if (!canRun(t)) return;
  const { connect, memory } = await serving(t, { mode: 'fill', window: 4 * KiB });

  const { peer, session } = await connect();

  t.is(session.mode, 'fill');
  t.is((await peer.ask('resident')).pages, IMAGE_SIZE / PAGE);
  t.is((await peer.ask('compare', memory)).different, 0);
  t.is(session.stats().faults, 0);
});

test('each process of a server can be filled or not', async t => {
  if (!canRun(t)) return;
  const { path } = image(t);
  const modes: (RestoreMode | undefined)[] = ['fill', undefined, 'windows'];
  const socketPath = `${folder(t)}/vm.sock`;
  const server = await serveFirecracker({
    socketPath,
    mode: 'fill',
    memory: () => {
      const mode = modes.shift();
      return mode === undefined ? path : { memory: path, mode };
    },
  });
  t.teardown(async () => server.close());

  for (const mode of ['fill', 'fill', 'windows'] as const) {
    const peer = new Peer(['--socket', socketPath, '--region', `${IMAGE_SIZE}`]);
    t.teardown(async () => {
      peer.kill();
      await peer.ended;
    });
    await peer.ready();
    const session = await server.accept({ timeout: 10_000 });
    t.is(session.mode, mode);
    t.is((await peer.ask('resident')).pages, mode === 'fill' ? IMAGE_SIZE / PAGE : 0);
  }
});

test('a process that cannot be filled is turned away, and the server goes on', async t => {
  if (!canRun(t)) return;
  const reason = new Error('nothing there');
  const source = callbackSource(async () => Promise.reject(reason), { size: IMAGE_SIZE });
  const { server, start } = await serving(t, { mode: 'fill', memory: source });
  server.on('session', () => t.fail('there is no session'));
  const rejected = nextRejection(server);

  const peer = start('--region', `${IMAGE_SIZE}`);
  await peer.ready();
  const { error, peer: who } = await rejected;

  t.is(error.code, 'ERR_UFFD_SOURCE');
  t.is(who?.pid, peer.pid);
  t.is(server.sessions.length, 0);
  t.is((await peer.ask('probe', 0)).result, 'efault');
});

test('a VM is loaded paused, filled, and then resumed', async t => {
  if (!canRun(t)) return;
  const { firecracker, options } = await prepared(t);
  const resident = residentWhenResumed(firecracker);

  const vm = await restoreFirecracker({ ...options, mode: 'fill' });

  t.is(resident(), IMAGE_SIZE / PAGE);
  t.deepEqual(
    firecracker.requests.map(({ line, body }) => [
      line,
      /resume_vm":(\w+)|state":"(\w+)/.exec(body)?.slice(1),
    ]),
    [
      ['PUT /snapshot/load HTTP/1.1', ['false', undefined]],
      ['PATCH /vm HTTP/1.1', [undefined, 'Resumed']],
    ],
  );
  const { handshake, filled, loaded, total } = vm.timings;
  t.true(handshake <= filled && Math.max(filled, loaded) <= total, JSON.stringify(vm.timings));
  t.is(vm.session.mode, 'fill');
  await vm.close();
});

test('a filled VM that is not to be resumed stays paused', async t => {
  if (!canRun(t)) return;
  const { firecracker, options } = await prepared(t);

  const vm = await restoreFirecracker({ ...options, mode: 'fill', resume: false });

  t.is(firecracker.requests.length, 1);
  t.is((await firecracker.peer.ask('resident')).pages, IMAGE_SIZE / PAGE);
  await vm.close();
});

test('a function may fill the VM it is asked about before that is resumed', async t => {
  if (!canRun(t)) return;
  const { firecracker, options } = await prepared(t);
  const memory = (): { memory: string; mode: RestoreMode } => ({
    memory: options.memory as string,
    mode: 'fill',
  });

  const vm = await restoreFirecracker({ ...options, memory });

  t.deepEqual(
    firecracker.requests.map(({ body }) => body.includes('"resume_vm":false') || body.includes('Resumed')),
    [true, true],
  );
  t.is((await firecracker.peer.ask('resident')).pages, IMAGE_SIZE / PAGE);
  await vm.close();
});

test('a restore whose VM does not resume fails, and leaves nothing', async t => {
  if (!canRun(t)) return;
  const { firecracker, options, temporary } = await prepared(t);
  firecracker.onState = silence;

  await t.throwsAsync(restoreFirecracker({ ...options, mode: 'fill', timeout: 500 }), {
    code: 'ERR_UFFD_TIMEOUT',
    message: /did not answer PATCH \/vm within 500 ms/,
  });

  t.deepEqual(leftIn(temporary), []);
});

test('a mode that does not exist is refused by name', async t => {
  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGE));
  await using pager = Pager.create();
  const source = bufferSource(pageOf(7));
  const wrong = { code: 'ERR_INVALID_ARG_VALUE', message: /options\.mode/ };

  await t.throwsAsync(pager.serve(mapping, { source, mode: 'all' as never }), wrong);
  await t.throwsAsync(serveFirecracker({ socketPath: '/x', memory: '/x', mode: 1 as never }), wrong);
  await t.throwsAsync(
    restoreFirecracker({ apiSocket: '/x', state: '/x', memory: '/x', mode: '' as never }),
    wrong,
  );
  await t.throwsAsync(pager.serve(mapping, { source, signal: 1 as never }), { code: 'ERR_INVALID_ARG_TYPE' });
  await setImmediate();
  t.is(present(mapping), 0);
});
