// Forked children of processes that are served: sessions of their own.

import { once } from 'node:events';

import test, { type ExecutionContext } from 'ava';
import {
  type AdoptOptions,
  callbackSource,
  capabilities,
  fileSource,
  MemoryMapping,
  Pager,
  type Session,
} from 'userfaultfd';

import { type Handed, handedOver } from './helpers/adopting.js';
import { PAGE } from './helpers/faults.js';
import { canRun, image, IMAGE_SIZE, serving } from './helpers/serving.js';

const PAGES = 64;
const SIZE = PAGES * PAGE;
/** Bits of features: fork and remove events; write-protect faults; minor faults of shared memory. */
const [FOLLOWING, WRITE_PROTECT, MINOR] = [0xa, 0x1, 0x400];

function canFollow(t: ExecutionContext): boolean {
  if (!canRun(t)) return false;
  if (capabilities().ptrace) return true;
  t.log('skipped: event-fork needs CAP_SYS_PTRACE');
  t.pass();
  return false;
}

/** Another process being served, whose children are as well. */
async function adopted(
  t: ExecutionContext,
  options: Partial<AdoptOptions> & Pick<AdoptOptions, 'source'>,
  { features = FOLLOWING, args = '' } = {},
): Promise<Handed & { pager: Pager; session: Session }> {
  const handed = await handedOver(t, `--region ${SIZE} --features ${features.toString(16)}${args}`);
  const { uffd, pidfd, regions, memfd } = handed;
  const pager = Pager.create();
  t.teardown(async () => pager.close());
  const inMemfd = memfd === undefined ? {} : { memfd };
  const session = await pager.adopt(uffd, { regions, pidfd, ...inMemfd, ...options });
  return { ...handed, pager, session };
}

/** Lets the process fork; the session of its child. */
async function forked({ peer, pager }: Pick<Handed, 'peer'> & { pager: Pager }): Promise<Session> {
  const [[child]] = (await Promise.all([once(pager, 'session'), peer.ask('fork')])) as [[Session], unknown];
  return child;
}

const hex = (text: string): string => Buffer.from(text).toString('hex');

test('a forked child is served apart from its parent, from where it was when it was forked', async t => {
  if (!canFollow(t)) return;
  const { path, bytes } = image(t, SIZE);
  const made = await adopted(t, { source: fileSource(path), window: PAGE });
  const { peer, pager, session } = made;
  const page = (number: number): string => bytes.subarray(number * PAGE, number * PAGE + 8).toString('hex');
  await peer.ask('read', 0, 8);
  await peer.ask('write', PAGE, hex('written'));
  await peer.ask('discard', 2 * PAGE, PAGE);
  t.is(session.parent, undefined);

  const child = await forked(made);

  t.is(child.parent, session.id);
  t.deepEqual(child.peer, { ...session.peer, pid: 0 });
  t.deepEqual(child.regions, session.regions);
  t.deepEqual(pager.sessions, [session, child]);
  // What the parent does from now on is the parent's.
  await peer.ask('write', 0, hex('parent'));
  await peer.ask('write', 3 * PAGE, hex('parent'));
  await peer.ask('discard', 4 * PAGE, PAGE);
  t.is((await peer.askChild('read', 0, 8)).hex, page(0));
  t.is((await peer.askChild('read', PAGE, 7)).hex, hex('written'));
  t.is((await peer.askChild('read', 2 * PAGE, 8)).hex, '00'.repeat(8));
  t.is((await peer.askChild('read', 3 * PAGE, 8)).hex, page(3));
  t.is((await peer.askChild('read', 4 * PAGE, 8)).hex, page(4));
  // And the other way round.
  await peer.askChild('discard', 5 * PAGE, PAGE);
  await peer.askChild('write', 6 * PAGE, hex('child'));
  t.is((await peer.askChild('zeros')).nonzero, 0);
  t.is((await peer.ask('read', 5 * PAGE, 8)).hex, page(5));
  t.is((await peer.ask('read', 6 * PAGE, 8)).hex, page(6));
  t.true(child.stats().faults >= 3 && child.stats().pagesRemoved === 1, JSON.stringify(child.stats()));

  t.deepEqual((await peer.ask('join')).status, 0);
  t.is((await child.closed).reason, 'peer-exited');
  t.deepEqual(pager.sessions, [session]);
  t.is((await peer.ask('read', 7 * PAGE, 8)).hex, page(7));
  const { faults, faultsInstalled, faultsZeroed, unanswered, joined, alreadyPresent } = child.stats();
  t.is(faults, faultsInstalled + faultsZeroed + unanswered + joined + alreadyPresent);
});

test('closing the session of a child is the child’s alone', async t => {
  if (!canFollow(t)) return;
  const { path } = image(t, SIZE);
  const made = await adopted(t, { source: fileSource(path) });
  const { peer } = made;
  const child = await forked(made);

  t.is((await child.close()).reason, 'closed');

  t.is((await peer.askChild('probe', 9 * PAGE)).result, 'efault');
  t.is((await peer.ask('compare', path)).different, 0);
});

test('a child goes on when its parent is killed, and what it waits for comes', async t => {
  if (!canFollow(t)) return;
  const gate = new EventTarget();
  let asked = (): void => {};
  const wanted = new Promise<void>(resolve => {
    asked = resolve;
  });
  const source = callbackSource(
    async (_, length) => {
      asked();
      await new Promise(resolve => {
        gate.addEventListener('open', resolve, { once: true });
      });
      return new Uint8Array(length).fill(7);
    },
    { size: SIZE },
  );
  const made = await adopted(t, { source });
  const { peer, pager, session } = made;
  const child = await forked(made);
  peer.send('child', 'read', 0, 8);
  await wanted;

  peer.kill();

  t.is((await session.closed).reason, 'peer-exited');
  t.deepEqual(pager.sessions, [child]);
  gate.dispatchEvent(new Event('open'));
  // It has nobody left to obey, and exits.
  t.is((await child.closed).reason, 'peer-exited');
  t.is(child.stats().faultsInstalled, 1);
  await pager.drain({ timeout: 10_000 });
});

test('a source that fails ends parent and child each by its own fault, with the cause', async t => {
  if (!canFollow(t)) return;
  const cause = new Error('out of order');
  const source = callbackSource(
    () => {
      throw cause;
    },
    { size: SIZE, retries: 0 },
  );
  const made = await adopted(t, { source });
  const { peer, session } = made;
  const child = await forked(made);

  t.is((await peer.askChild('probe', PAGE)).result, 'efault');

  const { reason, error } = await child.closed;
  t.deepEqual([reason, error?.code, error?.cause], ['source-failed', 'ERR_UFFD_SOURCE', cause]);
  t.is((await peer.ask('probe', PAGE)).result, 'efault');
  t.is((await session.closed).reason, 'source-failed');
});

test('what a child writes to is told by its own session', async t => {
  if (!canFollow(t)) return;
  const { path } = image(t, SIZE);
  const made = await adopted(
    t,
    { source: fileSource(path), modes: ['missing', 'write-protect'] },
    { features: FOLLOWING | WRITE_PROTECT, args: ' --modes missing,write-protect' },
  );
  const { peer, session } = made;
  await peer.ask('read', 0, 8);
  const child = await forked(made);

  await peer.askChild('write', 0, hex('child'));
  await peer.ask('write', 8 * PAGE, hex('parent'));

  const dirty = async (of: Session): Promise<unknown[]> =>
    (await of.takeDirty()).ranges.map(({ sourceOffset, length }) => [sourceOffset, length]);
  t.deepEqual(await dirty(child), [[0, PAGE]]);
  t.deepEqual(await dirty(session), [[8 * PAGE, PAGE]]);
});

test('of memory that is brought to a memfd only the parent is served on, and the child is told why', async t => {
  if (!canFollow(t)) return;
  const { path, bytes } = image(t, SIZE);
  const made = await adopted(
    t,
    { source: fileSource(path), modes: ['missing', 'minor'], window: PAGE },
    { features: FOLLOWING | MINOR, args: ' --memfd --fd memfd --modes missing,minor' },
  );
  const { peer, memfd } = made;
  await peer.ask('read', 0, 8);

  const child = await forked(made);

  const { reason, error } = await child.closed;
  t.deepEqual([reason, error?.code], ['protocol', 'ERR_UFFD_UNSUPPORTED']);
  t.regex(error?.message ?? '', /forked.*memfd/);
  t.is((await peer.askChild('probe', 9 * PAGE)).result, 'efault');
  t.is((await peer.ask('compare', path)).different, 0);
  using here = MemoryMapping.file(memfd as number, { access: 'shared' });
  t.true((await here.read(0, SIZE)).equals(bytes));
});

test('a process that a Firecracker server serves may fork: its children count, and one too many is told', async t => {
  if (!canFollow(t)) return;
  const { server, connect, memory } = await serving(t, { maxSessions: 2 });
  const { peer, session } = await connect('--features', FOLLOWING.toString(16));
  await peer.ask('read', 0, 8);

  await peer.ask('fork');
  const child = await server.accept({ timeout: 10_000 });

  t.deepEqual([child.parent, child.peer.pid, child.regions], [session.id, 0, session.regions]);
  t.is((await peer.askChild('compare', memory)).different, 0);
  t.deepEqual(server.sessions, [session, child]);
  // It is over as soon as it has begun, and so nothing to accept.
  const begun = once(server, 'session', { signal: AbortSignal.timeout(10_000) });
  await peer.askChild('fork');
  const [grandchild] = (await begun) as [Session];
  t.is(grandchild.parent, child.id);
  t.is((await grandchild.closed).error?.code, 'ERR_UFFD_EXHAUSTED');
  t.is((await peer.ask('join')).status, 0);
  t.is((await child.closed).reason, 'peer-exited');
  t.is((await peer.ask('touch')).bytes, IMAGE_SIZE);
  t.is((await peer.ask('compare', memory)).different, 0);
});
