// Eight threads of another process fault at random, over memory that is answered in random order, with mistakes.

import { setTimeout } from 'node:timers/promises';

import test from 'ava';
import type { Fault, HandlerEnd } from 'userfaultfd';

import { Faulter } from './helpers/faulter.js';
import { PAGE, pageOf } from './helpers/faults.js';
import { random } from './helpers/rounds.js';

const PAGES = 16_384;
const THREADS = 8;

test('nothing is lost, nothing is answered twice, and the end comes last', async t => {
  const faulter = await Faulter.start(t, 0);
  if (!faulter) return;
  const seed = Date.now() % 2 ** 20;
  t.log(`seed ${seed}`);
  const chance = random(seed);
  const start = await faulter.map(PAGES);
  const thrown = new Set<number>();
  const deferred = new Set<number>();
  const waiting: { page: number; answer: () => void }[] = [];
  const open = new Set<Fault>();
  let failed = 0;
  let twice = 0;
  let isOver = false;
  let ends = 0;

  /** Answers those that wait, in any order. */
  const answerSome = (): void => {
    while (waiting.length > 0) {
      const [one] = waiting.splice(Math.floor(chance() * waiting.length), 1);
      one?.answer();
    }
  };
  const handler = faulter.handle(t, {
    fault(fault) {
      if (isOver) t.fail('a fault came after the end');
      const page = (Number(fault.address) - start) / PAGE;
      const luck = chance();
      if (luck < 0.01) {
        thrown.add(page);
        throw new Error('a mistake');
      }
      if (luck < 0.06) {
        deferred.add(page);
        return fault.defer();
      }
      const answer = (): void => {
        if (fault.settled) twice += 1;
        fault.copy(pageOf((page % 251) + 1));
        open.delete(fault);
      };
      if (luck < 0.5) return answer();
      open.add(fault);
      return new Promise<void>(resolve => {
        waiting.push({ page, answer: () => resolve(answer()) });
        if (waiting.length >= 4) answerSome();
        else setImmediate(answerSome);
      });
    },
    failed(error) {
      t.is(error.code, 'ERR_UFFD_UNANSWERED');
      failed += 1;
    },
    closed() {
      isOver = true;
      ends += 1;
    },
  });

  const [loads, ...poisoned] = (await faulter.ask('storm', start, PAGES, THREADS, seed)).map(Number);

  t.is((loads ?? 0) + poisoned.length, PAGES * THREADS);
  t.deepEqual(
    poisoned.filter(page => !thrown.has(page)),
    [],
    'pages were poisoned that nobody had given up',
  );
  t.true(failed >= new Set(poisoned).size && failed > 0);
  t.true(deferred.size > 0);
  t.is(twice, 0);
  t.is(open.size, 0);
  t.is(faulter.uffd.waitingThreads(), 0);

  const end: HandlerEnd = await handler.close({ rest: 'zero' });
  await setTimeout(5);
  t.is(end.reason, 'closed');
  t.is(ends, 1);
});
