// Many faults in one batch, answered by one call: pages side by side are brought together.

import { setTimeout } from 'node:timers/promises';

import test, { type ExecutionContext } from 'ava';
import type { FaultBatch, UffdError } from 'userfaultfd';

import { Faulter } from './helpers/faulter.js';
import { PAGE, pageOf } from './helpers/faults.js';

/** Pages in no order: 0 to 5, 8, 10 and 11. */
const PAGES = [4, 10, 1, 0, 8, 3, 11, 5, 2];

interface Waiting {
  faulter: Faulter;
  /** The page of a fault of the batch. */
  pageAt(batch: FaultBatch, index: number): number;
  /** Where a page is. */
  at(page: number): { address: bigint; length: number };
  /** What each of the threads has read, in the order of `PAGES`. */
  answers: Promise<number[]>;
}

/** A thread of another process waits for each page, before there is a handler. */
async function waiting(t: ExecutionContext): Promise<Waiting | undefined> {
  const faulter = await Faulter.start(t, 0);
  if (!faulter) return undefined;
  const start = await faulter.map(12);
  const answers: Promise<{ byte: number }>[] = [];
  for (const page of PAGES) {
    answers.push(faulter.load(start + page * PAGE));
    while (faulter.uffd.waitingThreads() < answers.length) await setTimeout(1);
  }
  return {
    faulter,
    pageAt: (batch, index) => (Number(batch.address(index)) - start) / PAGE,
    at: page => ({ address: BigInt(start + page * PAGE), length: PAGE }),
    answers: Promise.all(answers.map(async answer => (await answer).byte)),
  };
}

/** Answers the one batch that comes; what the answer came to. */
async function answered(
  t: ExecutionContext,
  { faulter, answers }: Waiting,
  answer: (batch: FaultBatch) => number,
): Promise<{ counts: number[]; bytes: number[]; failed: unknown[] }> {
  const counts: number[] = [];
  const failed: unknown[] = [];
  faulter.handle(t, {
    faults(batch) {
      t.is(batch.length, PAGES.length);
      counts.push(answer(batch));
    },
    failed: error => failed.push((error.cause as UffdError).code),
  });
  return { bytes: await answers, counts, failed };
}

test('a batch in no order gets its bytes page by page', async t => {
  const made = await waiting(t);
  if (!made) return;

  const { counts, bytes } = await answered(t, made, batch => {
    const pages = Array.from(batch, (_, index) => pageOf(made.pageAt(batch, index) + 1));
    return batch.copy(Buffer.concat(pages));
  });

  t.deepEqual(counts, [PAGES.length]);
  t.deepEqual(
    bytes,
    PAGES.map(page => page + 1),
  );
});

test('a batch gets one page for all', async t => {
  const made = await waiting(t);
  if (!made) return;

  const { counts, bytes } = await answered(t, made, batch => batch.copy(pageOf(7)));

  t.deepEqual(counts, [PAGES.length]);
  t.deepEqual(
    bytes,
    PAGES.map(() => 7),
  );
});

test('a page that is there already is in the way of nothing, and its thread goes on', async t => {
  const made = await waiting(t);
  if (!made) return;
  for (const page of [1, 3, 10]) made.faulter.uffd.copy(made.at(page), pageOf(9), { wake: false });

  const { counts, bytes } = await answered(t, made, batch => batch.zero());

  t.deepEqual(counts, [PAGES.length]);
  t.deepEqual(
    bytes,
    PAGES.map(page => ([1, 3, 10].includes(page) ? 9 : 0)),
  );
});

test('what was answered by itself is left alone by an answer to all', async t => {
  const made = await waiting(t);
  if (!made) return;

  const { counts, bytes } = await answered(t, made, batch => {
    for (const fault of batch) {
      if ([0, 4, 11].includes((Number(fault.address) - Number(made.at(0).address)) / PAGE))
        fault.copy(pageOf(5));
    }
    return batch.zero();
  });

  t.deepEqual(counts, [PAGES.length - 3]);
  t.deepEqual(
    bytes,
    PAGES.map(page => ([0, 4, 11].includes(page) ? 5 : 0)),
  );
});

test('what of a run is registered no longer does not keep the rest from being answered', async t => {
  const made = await waiting(t);
  if (!made) return;

  const { bytes, counts, failed } = await answered(t, made, batch => {
    // Its thread goes on, with zeros.
    made.faulter.uffd.unregister(made.at(3));
    return batch.zero();
  });

  t.deepEqual(counts, [PAGES.length - 1]);
  t.deepEqual(failed, ['ERR_UFFD_NOT_REGISTERED']);
  t.deepEqual(
    bytes,
    PAGES.map(() => 0),
  );
});
