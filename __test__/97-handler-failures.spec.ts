// What becomes of faults that a handler's callback has not answered, where that is not simply poison.

import { setTimeout } from 'node:timers/promises';

import test, { type ExecutionContext } from 'ava';
import type { Fault, FailurePolicy, FaultHandlerOptions, MemoryMapping, UffdError } from 'userfaultfd';

import { PAGE, pageOf, registered } from './helpers/faults.js';

const poisoned = { code: 'ERR_UFFD_SYSTEM', message: /EFAULT/ };

interface Told {
  error: UffdError;
  fault: Fault;
}

/** Memory whose handler throws at every fault. */
function throwing(
  t: ExecutionContext,
  options: FaultHandlerOptions,
): { mapping: MemoryMapping; told: Told[]; next: () => Promise<Told> } | undefined {
  const made = registered(t, 4, ['missing'], { require: ['poison'] });
  if (!made) return undefined;
  const told: Told[] = [];
  const callbacks = {
    fault: () => {
      throw new Error('not now');
    },
    failed: (error: UffdError, fault: Fault): void => void told.push({ error, fault }),
  };
  const handler = made.uffd.createHandler(callbacks, options);
  t.teardown(async () => handler.close({ rest: 'zero' }));
  const next = async (): Promise<Told> => {
    for (;;) {
      const first = told.shift();
      if (first) return first;
      await setTimeout(1);
    }
  };
  return { mapping: made.mapping, told, next };
}

test("a handler's 'hold': who is told of a fault can still answer it", async t => {
  const made = throwing(t, { onFailure: 'hold' });
  if (!made) return;
  const read = made.mapping.read(PAGE, 1);

  const { error, fault } = await made.next();
  t.is(error.code, 'ERR_UFFD_UNANSWERED');
  t.like(error.cause, { message: 'not now' });
  t.true(fault.copy(pageOf(7)));

  t.deepEqual([...(await read)], [7]);
});

test("a handler's 'hold' lasts until the deadline of the fault", async t => {
  const made = throwing(t, { onFailure: 'hold', faultDeadline: 50 });
  if (!made) return;

  await t.throwsAsync(made.mapping.read(0, 1), poisoned);

  t.is((await made.next()).error.code, 'ERR_UFFD_UNANSWERED');
  const { error, fault } = await made.next();
  t.is(error.code, 'ERR_UFFD_TIMEOUT');
  t.throws(() => fault.copy(pageOf(1)), { code: 'ERR_UFFD_STALE' });
});

test('a function says what becomes of a fault, and may answer it itself', async t => {
  const answers: ((fault: Fault) => FailurePolicy | Promise<FailurePolicy>)[] = [
    () => 'poison',
    async fault => {
      await setTimeout(1);
      fault.copy(pageOf(9));
      return 'poison' as const;
    },
  ];
  const asked: UffdError[] = [];
  const made = throwing(t, {
    onFailure: async (error, fault) => {
      asked.push(error);
      return answers[(fault.offset ?? 0) / PAGE]?.(fault) ?? 'poison';
    },
  });
  if (!made) return;

  await t.throwsAsync(made.mapping.read(0, 1), poisoned);
  t.deepEqual([...(await made.mapping.read(PAGE, 1))], [9]);

  t.deepEqual(
    asked.map(({ code }) => code),
    ['ERR_UFFD_UNANSWERED', 'ERR_UFFD_UNANSWERED'],
  );
  t.is((await made.next()).fault.offset, 0);
  t.is(made.told.length, 0, 'what was answered has not failed');
});

test.serial('a function that throws, or never answers: the page is poisoned', async t => {
  const warnings: string[] = [];
  const listen = ({ message }: Error): void => void warnings.push(message);
  process.on('warning', listen);
  t.teardown(() => process.off('warning', listen));
  const made = throwing(t, {
    faultDeadline: 50,
    onFailure: (_, { offset }) => {
      if (offset === 0) throw new Error('no idea');
      return new Promise<FailurePolicy>(() => {});
    },
  });
  if (!made) return;

  await t.throwsAsync(made.mapping.read(0, 1), poisoned);
  await t.throwsAsync(made.mapping.read(PAGE, 1), poisoned);

  t.true(warnings.some(message => message.includes('no idea')));
});
