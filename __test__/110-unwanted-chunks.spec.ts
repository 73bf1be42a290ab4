/** What a callback is told of chunks that no session waits for any more. */

import { once } from 'node:events';
import { setTimeout } from 'node:timers/promises';

import test, { type ExecutionContext } from 'ava';
import { callbackSource, MemoryMapping, overlaySource, type PageSource } from 'userfaultfd';

import { mapped, PAGE } from './helpers/faults.js';
import { pagerOf } from './helpers/pagers.js';
import { canRun } from './helpers/serving.js';

const SIZE = 16 * PAGE;
/** Milliseconds. */
const LIMIT = 10_000;

/** A source that never answers before it is told to, and the signals it was given, by offset. */
function slow(): { source: PageSource; signals: Map<number, AbortSignal>; answer: () => void } {
  const signals = new Map<number, AbortSignal>();
  let answer = (): void => {};
  const told = new Promise<void>(resolve => {
    answer = resolve;
  });
  const source = callbackSource(
    async (offset, length, { signal }) => {
      signals.set(offset, signal);
      await told;
      return new Uint8Array(length).fill(7);
    },
    { size: SIZE, chunk: PAGE },
  );
  return { source, signals, answer };
}

async function asked(signals: Map<number, AbortSignal>, count: number): Promise<void> {
  while (signals.size < count) await setTimeout(1);
}

async function aborted(signal: AbortSignal | undefined): Promise<void> {
  if (signal && !signal.aborted) await once(signal, 'abort');
}

function memory(t: ExecutionContext): MemoryMapping {
  t.timeout(LIMIT);
  return mapped(t, MemoryMapping.anonymous(SIZE));
}

for (const what of [
  'the session is closed',
  'the pager is closed',
  'the session is held',
  'overlays are closed',
]) {
  test(`chunks are given up when ${what}`, async t => {
    if (!canRun(t)) return;
    const mapping = memory(t);
    const pager = pagerOf(t);
    const { source, signals } = slow();
    t.teardown(() => source.close());
    const over = what.startsWith('overlays')
      ? overlaySource(source, [{ offset: 0, data: new Uint8Array(1) }])
      : source;
    const session = await pager.serve(mapping, { source: over, window: PAGE });
    const reading = mapping.read(3 * PAGE, 1).catch(() => {});
    await asked(signals, 1);

    if (what.endsWith('held')) await session.hold();
    else if (what.startsWith('the pager')) await pager.close({ rest: 'zero' });
    else await session.close({ rest: 'zero' });

    await aborted(signals.get(3 * PAGE));
    if (what.endsWith('held')) await session.close({ rest: 'zero' });
    await reading;
    t.is(source.failure(), undefined);
  });
}

test('a chunk that another session waits for is not given up, and comes', async t => {
  if (!canRun(t)) return;
  const [first, second] = [memory(t), memory(t)];
  const pager = pagerOf(t);
  const { source, signals, answer } = slow();
  const sessions = await Promise.all(
    [first, second].map(async mapping => pager.serve(mapping, { source, window: PAGE })),
  );
  const readings = [first, second].map(async mapping => mapping.read(3 * PAGE, 1).catch(() => undefined));
  const alone = first.read(5 * PAGE, 1).catch(() => undefined);
  await asked(signals, 2);
  while (sessions.some(session => session.stats().workerReads === 0)) await setTimeout(1);

  await sessions[0]?.close({ rest: 'zero' });
  await aborted(signals.get(5 * PAGE));

  t.false(signals.get(3 * PAGE)?.aborted);
  answer();
  t.deepEqual(await readings[1], Buffer.from([7]));
  await alone;
  // What was given up is asked for again.
  t.deepEqual(await second.read(5 * PAGE, 1), Buffer.from([7]));
  await sessions[1]?.close({ rest: 'zero' });
});
