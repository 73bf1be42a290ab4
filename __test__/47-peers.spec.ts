// What the suites of other bindings ask for and no other spec here does; named after them in conformance.json.

import { readFileSync } from 'node:fs';
import { setImmediate } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

import test from 'ava';
import { EventBatch, MemoryMapping, MiB, Userfaultfd } from 'userfaultfd';

import { inEveryWay, make, mapped, next, PAGE, pageOf } from './helpers/faults.js';
import { canRun } from './helpers/serving.js';

inEveryWay(
  'nothing is enabled that was not asked for, and every name told is one that can be asked for',
  t => {
    const uffd = make(t, { threadId: false });
    if (!uffd) return;

    t.deepEqual(uffd.enabledFeatures, []);
    t.deepEqual(make(t)?.enabledFeatures, ['thread-id'], 'the one that is asked for unless told otherwise');
    const known = (uffd.supportedFeatures ?? []).filter(name => !name.startsWith('bit-'));
    t.true(known.length > 0);
    const without = known.filter(name => name !== 'event-fork');
    const all = make(t, { prefer: without as never });
    t.deepEqual(
      without.filter(name => !all?.enabledFeatures?.includes(name)),
      [],
    );
  },
);

test('64 MiB are filled fault by fault while the event loop goes on', async t => {
  const uffd = make(t);
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(64 * MiB));
  uffd.register(mapping.range(), { modes: ['missing'] });
  let turns = 0;
  const done = new AbortController();
  const serving = (async () => {
    for await (const events of uffd.events({ signal: done.signal })) {
      for (const event of events) {
        if (event.type !== 'fault') continue;
        uffd.zero({ address: event.address, length: PAGE }, { onPresent: 'skip' });
      }
    }
  })();
  const counting = (async () => {
    for (; !done.signal.aborted; turns += 1) await setImmediate();
  })();

  const bytes = await mapping.read(0, 64 * MiB);

  done.abort(new Error('done'));
  await t.throwsAsync(serving, { message: 'done' });
  await counting;
  t.true(bytes.equals(Buffer.alloc(64 * MiB)));
  t.true(turns > 100, `${turns} turns`);
});

inEveryWay('modes that memory cannot have are the kernel’s refusal, and leave nothing registered', t => {
  const uffd = make(t);
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGE));

  const error = t.throws(() => uffd.register(mapping.range(), { modes: ['minor'] }), {
    code: 'ERR_UFFD_SYSTEM',
  });
  t.like(error, { kind: 'Userfaultfd', syscall: 'UFFDIO_REGISTER' });

  t.deepEqual(
    [uffd.tryZero(mapping.range()) < 0, mapping.residency()],
    [true, ['absent']],
    'still not registered',
  );
});

inEveryWay('a page given back faults again, as often as it is', async t => {
  const uffd = make(t, { threadId: false });
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.memfd(2 * PAGE));
  uffd.register(mapping.range(), { modes: ['missing'] });

  for (const round of [1, 2, 3]) {
    const reading = mapping.read(PAGE, 1);
    const event = next(t, uffd).at(0);
    t.like(event, { type: 'fault', kind: 'missing', address: mapping.address + BigInt(PAGE) });
    t.false('threadId' in event);
    uffd.copy(mapping.range(PAGE, PAGE), pageOf(round));
    t.deepEqual([...(await reading)], [round]);
    await mapping.discard(PAGE, PAGE);
  }
});

inEveryWay('a populated page is moved to a thread that waits for it', async t => {
  const uffd = make(t, { require: ['move'] });
  if (!uffd) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGE));
  const source = mapped(t, MemoryMapping.anonymous(PAGE, { pages: 'small' }));
  source.writeSync(0, pageOf(5));
  uffd.register(mapping.range(), { modes: ['missing'] });
  const reading = mapping.read(0, 1);
  next(t, uffd);

  uffd.move(mapping.range(), source.range());

  t.deepEqual([...(await reading)], [5]);
  t.deepEqual(source.residency(), ['absent']);
});

test('registered memory is kept while its userfaultfd is, also when nobody else has it', async t => {
  if (!canRun(t)) return;
  const uffd = Userfaultfd.create();
  t.teardown(() => uffd.close({ waiting: 'zero' }));
  const { address } = registeredAndDropped(uffd);
  setFlagsFromString('--expose-gc');
  const collect = runInNewContext('gc') as () => void;
  for (let turn = 0; turn < 5; turn += 1) {
    collect();
    await setImmediate();
  }

  t.regex(readFileSync('/proc/self/maps', 'latin1'), new RegExp(`^${address.toString(16)}-`, 'm'));
  t.is(uffd.tryCopy({ address, length: PAGE }, pageOf(3)), PAGE);
});

/** On a stack frame of its own, which is gone when it returns. */
function registeredAndDropped(uffd: Userfaultfd): { address: bigint } {
  const mapping = MemoryMapping.anonymous(PAGE);
  uffd.register(mapping.range(), { modes: ['missing'] });
  return { address: mapping.address };
}

inEveryWay('reading waits as long as it is told to, and no longer', async t => {
  const uffd = make(t);
  if (!uffd) return;
  const batch = new EventBatch(1);
  for (const timeout of [0, 30]) {
    const start = performance.now();
    t.is(uffd.waitSync(batch, { timeout }), 0);
    t.true(performance.now() - start >= timeout - 1);
  }
  const start = performance.now();
  t.false(await uffd.wait({ timeout: 30 }));
  t.true(performance.now() - start >= 29);
});
