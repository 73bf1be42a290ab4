/** Pagers of this process that are closed with their test. */

import type { ExecutionContext } from 'ava';
import { MemoryMapping, Pager, type ServeOptions, type Session } from 'userfaultfd';

import { mapped, PAGE } from './faults.js';

/** One; what nobody has touched by then reads zero. */
export function pagerOf(t: ExecutionContext): Pager {
  const pager = Pager.create();
  t.teardown(async () => pager.close({ rest: 'zero' }));
  return pager;
}

/** Memory of this process, and its session. */
export interface Served {
  mapping: MemoryMapping;
  session: Session;
}

/** So many pages, served. */
export async function servedPages(
  t: ExecutionContext,
  pages: number,
  options: ServeOptions,
): Promise<Served> {
  const mapping = mapped(t, MemoryMapping.anonymous(pages * PAGE));
  return { mapping, session: await pagerOf(t).serve(mapping, options) };
}
