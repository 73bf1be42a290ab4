/** Userfaultfds of every kind this machine has, and faults to answer. */

import type { ExecutionContext } from 'ava';
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

/** The ways to make a userfaultfd: through the device and by the system call, for all faults and those of user mode. */
export const MAKERS = (['device', 'syscall'] as const).flatMap(backend =>
  (['all', 'user'] as const).map(faults => ({ backend, faults, name: `${backend}, ${faults} faults` })),
);

/** A userfaultfd made in one of the ways, or a reason logged. It is closed when the test ends. */
export function make(
  t: ExecutionContext,
  options: CreateOptions = {},
  backend: 'device' | 'syscall' = 'device',
): Userfaultfd | undefined {
  if (!canRun(t)) return undefined;
  const factory = backend === 'device' ? UserfaultfdFactory.open() : UserfaultfdFactory.syscallOnly();
  t.teardown(() => factory.close());
  const missing = (options.require ?? []).filter(name => !capabilities().features.includes(name));
  if (missing.length > 0) {
    t.log(`skipped: this kernel has no ${missing.join(', ')}`);
    t.pass();
    return undefined;
  }
  const uffd = factory.create(options);
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
