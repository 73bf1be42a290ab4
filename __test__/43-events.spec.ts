// Events of the address space, read by a worker while this thread causes them; and what is known of the dead.

import { spawn } from 'node:child_process';

import test, { type ExecutionContext } from 'ava';
import {
  capabilities,
  DeadUffdChecker,
  EventBatch,
  MemoryMapping,
  registerRegions,
  Userfaultfd,
} from 'userfaultfd';

import { inEveryWay, make, mapped, next, PAGE, pageOf, registered } from './helpers/faults.js';
import { holdings, leaked, manyLives, random, terminateWorkers } from './helpers/rounds.js';
import { resources } from './helpers/serving.js';

/** A process that was forked while its parent's memory was registered; and its userfaultfd, from the event. */
function forked(
  t: ExecutionContext,
  uffd: Userfaultfd,
): { child: Userfaultfd; process: ReturnType<typeof spawn> } {
  // fork(2) waits in here until the event was read, which this thread cannot do: the guard does.
  const process = spawn('sleep', ['60'], { stdio: 'ignore' });
  t.teardown(() => process.kill('SIGKILL'));
  const event = next(t, uffd).at(0);
  t.is(event.type, 'fork');
  const { child } = event as { child: Userfaultfd };
  t.teardown(() => child.close({ waiting: 'zero' }));
  return { child, process };
}

/** A userfaultfd that follows forks, where that is permitted. */
function follower(t: ExecutionContext): Userfaultfd | undefined {
  if (capabilities().ptrace) return make(t, { require: ['event-fork'] });
  t.throws(() => Userfaultfd.create({ require: ['event-fork'] }), {
    code: /NOT_PERMITTED|UNSUPPORTED/ as never,
  });
  t.log('skipped: event-fork needs CAP_SYS_PTRACE');
  return undefined;
}

inEveryWay(
  'a process that forks hands over its child’s userfaultfd, which tells when the child is gone',
  async t => {
    const uffd = follower(t);
    if (!uffd) return;
    const mapping = mapped(t, MemoryMapping.anonymous(2 * PAGE));
    uffd.register(mapping.range(), { modes: ['missing'] });

    const { child } = forked(t, uffd);
    // sleep(1) was started by exec, which ends the memory that was forked.
    const batch = new EventBatch();
    t.is(child.waitSync(batch, { timeout: 10_000 }), -1);

    t.true(child.isDead());
    t.false(uffd.isDead());
    t.throws(() => child.copy(mapping.range(0, PAGE), pageOf(1)), { code: 'ERR_UFFD_CLOSED' });
    t.throws(() => child.register(mapping.range(), { modes: ['missing'] }), { code: 'ERR_UFFD_CLOSED' });
    uffd.zero(mapping.range());
    const own = mapped(t, MemoryMapping.anonymous(PAGE));
    const targets = [
      { uffd: child, ranges: [own.range()] },
      { uffd, ranges: [own.range()] },
    ];
    t.deepEqual(registerRegions(targets, { modes: ['missing'] }), [child]);
  },
);

inEveryWay('the checker finds the dead and says nothing of the living', async t => {
  const uffd = follower(t);
  if (!uffd) return;
  const checker = new DeadUffdChecker();
  checker.register(uffd);
  const { child } = forked(t, uffd);
  t.is(child.waitSync(new EventBatch(), { timeout: 10_000 }), -1);

  for (let round = 0; round < 3; round += 1) {
    t.true(checker.isDead(child));
    t.false(checker.isDead(uffd));
    await checker.reset();
  }
  t.throws(() => checker.register(child), { code: 'ERR_UFFD_CLOSED' });
});

inEveryWay(
  'memory that this very thread gives back is told to it afterwards, and it never waits for itself',
  async t => {
    const made = registered(t, 4, ['missing'], { require: ['event-remove', 'event-unmap'] });
    if (!made) return;
    const { uffd } = made;
    const mapping = MemoryMapping.anonymous(4 * PAGE);
    uffd.register(mapping.range(), { modes: ['missing'] });
    // Waits in here until the event was read, by the guard.
    mapping.discardSync(PAGE, PAGE);

    const start = mapping.address + BigInt(PAGE);
    t.deepEqual([...next(t, uffd)], [{ type: 'remove', start, end: start + BigInt(PAGE) }]);
    mapping.close();
  },
);

inEveryWay('events are kept in order and none is lost, however many happen while nobody reads', t => {
  const made = registered(t, 64, ['missing'], { require: ['event-remove'] });
  if (!made) return;
  const { uffd, mapping } = made;
  for (let page = 0; page < 64; page += 1) mapping.discardSync(page * PAGE, PAGE);

  const starts: bigint[] = [];
  while (starts.length < 64)
    for (const event of next(t, uffd)) starts.push((event as { start: bigint }).start);

  t.deepEqual(
    starts,
    Array.from({ length: 64 }, (_, page) => mapping.address + BigInt(page * PAGE)),
  );
});

inEveryWay('userfaultfds of children that nobody takes out of a batch are closed', t => {
  const uffd = follower(t);
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGE));
  uffd.register(mapping.range(), { modes: ['missing'] });
  const count = (): number => resources().fds.length;
  const batch = new EventBatch();
  const process = spawn('true', [], { stdio: 'ignore' });
  t.teardown(() => process.kill('SIGKILL'));
  t.true(uffd.waitSync(batch, { timeout: 10_000 }) > 0);
  const before = count();

  batch.clear();

  t.is(count(), before - 1);
});

test('creating, registering and closing 100,000 times leaves nothing behind', async t => {
  if (!make(t)) return;
  // Until the heap has the size it keeps.
  await manyLives(10_000);
  const before = holdings();

  await manyLives(100_000);

  t.deepEqual(leaked(before, holdings()), []);
});

test('workers that are terminated at random moments with faults pending leave nothing behind', async t => {
  if (!make(t)) return;
  const seed = Date.now() % 2 ** 32;
  t.log(`seed ${seed}`);
  const chance = random(seed);
  // The first ones leave what is kept for later ones: threads of a pool, the engine's memory.
  await terminateWorkers(20, chance);
  const before = holdings();

  await terminateWorkers(20, chance);

  t.deepEqual(leaked(before, holdings()), []);
});
