/** Userfaultfds of every kind this machine has, and faults to answer. */

import test, { type ExecutionContext } from 'ava';
import {
  capabilities,
  type CreateOptions,
  EventBatch,
  MemoryMapping,
  type RegisterMode,
  type Userfaultfd,
  UserfaultfdFactory,
} from 'userfaultfd';

import { canRun } from './serving.js';

export const PAGE = 4096;

/** A page of one byte. */
export const pageOf = (byte: number, pages = 1): Buffer => Buffer.alloc(pages * PAGE, byte);

/** A way to make a userfaultfd. */
export interface Way {
  readonly backend: 'device' | 'syscall';
  readonly faults: 'all' | 'user';
}

/** Through the device and by the system call, for all faults and those of user mode. */
const WAYS: Way[] = (['device', 'syscall'] as const).flatMap(backend =>
  (['all', 'user'] as const).map(faults => ({ backend, faults })),
);
const waysOf = new WeakMap<ExecutionContext, Way>();

/** How `make` and `registered` make userfaultfds in this test. */
export const wayOf = (t: ExecutionContext): Way => waysOf.get(t) ?? { backend: 'device', faults: 'all' };

/** A test for every way in which a userfaultfd can be made. */
export function inEveryWay(title: string, act: (t: ExecutionContext) => Promise<void> | void): void {
  for (const way of WAYS) {
    test(`${title} (${way.backend}, ${way.faults} faults)`, async t => {
      waysOf.set(t, way);
      await act(t);
    });
  }
}

/** A userfaultfd, or a reason logged. It is closed when the test ends. */
export function make(t: ExecutionContext, options: CreateOptions = {}): Userfaultfd | undefined {
  if (!canRun(t)) return undefined;
  const { backend, faults } = wayOf(t);
  const factory = backend === 'device' ? UserfaultfdFactory.open() : UserfaultfdFactory.syscallOnly();
  t.teardown(() => factory.close());
  const missing = (options.require ?? []).filter(name => !capabilities().features.includes(name));
  if (missing.length > 0) {
    t.log(`skipped: this kernel has no ${missing.join(', ')}`);
    t.pass();
    return undefined;
  }
  const uffd = factory.create({ faults, ...options });
  t.teardown(() => uffd.close({ waiting: 'zero' }));
  return uffd;
}

/** Memory that is unmapped when the test ends. */
export function mapped(t: ExecutionContext, mapping: MemoryMapping): MemoryMapping {
  t.teardown(() => mapping.close());
  return mapping;
}

/** A userfaultfd and private memory of some pages, registered. */
export function registered(
  t: ExecutionContext,
  pages: number,
  modes: RegisterMode[] = ['missing'],
  options: CreateOptions = {},
): { uffd: Userfaultfd; mapping: MemoryMapping } | undefined {
  const mapping = mapped(t, MemoryMapping.anonymous(pages * PAGE));
  const uffd = make(t, options);
  if (!uffd) return undefined;
  uffd.register(mapping.range(), { modes });
  return { uffd, mapping };
}

/** The next messages; fails the test when none comes. */
export function next(t: ExecutionContext, uffd: Userfaultfd): EventBatch {
  const batch = new EventBatch();
  t.true(uffd.waitSync(batch, { timeout: 10_000 }) > 0, 'no message came');
  return batch;
}
