/** What `userfaultfd bench` measures, each in a process of its own (`measure.ts`), with what it is compared with. */

import { readFileSync, statSync } from 'node:fs';

import type { NativeJob } from '#native';

import { UffdError, type UffdErrorCode } from '../../errors.js';
import { MemoryMapping } from '../../mapping.js';
import { native } from '../../native.js';
import { Pager, type ServeOptions } from '../../pager.js';
import { bufferSource, fileSource } from '../../sources.js';
import { MiB } from '../../units.js';
import { Userfaultfd } from '../../userfaultfd.js';

/**
 * What there is to measure. Of this package: `page`, a fault gets its page and no more; `pager`, as it is by default; `handler`, a
 * callback in JavaScript; `call`, a copy for each call. Of the bare system calls: the floors. `mmap`: no pager at all.
 */
export type WorkName =
  | 'page'
  | 'pager'
  | 'handler'
  | 'call'
  | 'floor-answer'
  | 'floor-spin'
  | 'floor-fill'
  | 'floor-call'
  | 'mmap';

/** One measurement. */
export interface Task {
  readonly work: WorkName;
  /** The file of which everything is filled. */
  readonly image: string;
  /** In which order pages are touched; 0: from the first to the last. */
  readonly seed: number;
  /** CPU numbers: of the thread that touches, and of everything that answers it. */
  readonly toucher: number;
  readonly answerer: number;
}

/** What it came to. */
export interface Figures {
  /** Milliseconds until the last page was there. */
  total: number;
  /** Microseconds a page, of `total`. */
  each: number;
  /** Microseconds until a page was there. */
  p50: number;
  p99: number;
  /** Of what was read; the same for the same bytes in the same order or in another. Absent where nothing is read. */
  sum?: string;
}

/** Serves a mapping, and gives what ends that. */
type Serve = (mapping: MemoryMapping, image: string) => Promise<() => Promise<void>>;

async function bytesOf(job: Promise<NativeJob>): Promise<Buffer> {
  const { error, bytes } = await job;
  if (error !== undefined) {
    const { code, message, errno, syscall } = error;
    const details = {
      ...(errno === undefined ? {} : { errno }),
      ...(syscall === undefined ? {} : { syscall }),
    };
    throw new UffdError(code as UffdErrorCode, message, details);
  }
  return bytes ?? Buffer.alloc(0);
}

async function touch(mapping: MemoryMapping, { seed, toucher }: Task): Promise<Figures> {
  const bytes = await bytesOf(native().touchPages(mapping.nativeHandle(), seed, toucher));
  const total = Number(bytes.readBigUInt64LE(0));
  const latencies = Uint32Array.from({ length: (bytes.length - 16) / 4 }, (_, index) =>
    bytes.readUInt32LE(16 + 4 * index),
  ).toSorted();
  const percentile = (share: number): number =>
    (latencies[Math.max(0, Math.ceil(latencies.length * share) - 1)] ?? 0) / 1e3;
  return {
    total: total / 1e6,
    each: total / latencies.length / 1e3,
    p50: percentile(0.5),
    p99: percentile(0.99),
    sum: bytes.readBigUInt64LE(8).toString(),
  };
}

/** Memory that is touched while it is served. */
async function served(task: Task, serve: Serve): Promise<Figures> {
  const { size } = statSync(task.image);
  using mapping = MemoryMapping.anonymous(size, { pages: 'small' });
  const end = await serve(mapping, task.image);
  const figures = await touch(mapping, task);
  await end();
  return figures;
}

const byPager =
  (options: (image: string) => ServeOptions): Serve =>
  async (mapping, image) => {
    const pager = Pager.create();
    await pager.serve(mapping, options(image));
    return async () => pager.close();
  };

/** The image, mapped and read: nothing of it has to be fetched any more. */
async function ready(image: string, task: Task): Promise<MemoryMapping> {
  const mapping = MemoryMapping.file(image);
  await touch(mapping, { ...task, seed: 0 });
  return mapping;
}

/** A userfaultfd for a mapping, and the image: what the floor needs. */
async function bare(
  mapping: MemoryMapping,
  image: string,
  task: Task,
): Promise<{ uffd: Userfaultfd; handles: [number, number, number]; close: () => void }> {
  const source = await ready(image, task);
  const uffd = Userfaultfd.create();
  uffd.register(mapping.range(), { modes: ['missing'] });
  const handles = [uffd.nativeHandle() ?? -1, mapping.nativeHandle(), source.nativeHandle()] as const;
  return {
    uffd,
    handles: [...handles],
    close: () => {
      uffd.close();
      source.close();
    },
  };
}

const floorAnswer =
  (task: Task, spin: boolean): Serve =>
  async (mapping, image) => {
    const { handles, close } = await bare(mapping, image, task);
    const answering = bytesOf(native().floorAnswer(...handles, mapping.length / mapping.pageSize, spin));
    return async () => {
      await answering;
      close();
    };
  };

const byCallback: Serve = async (mapping, image) => {
  const bytes = readFileSync(image);
  const uffd = Userfaultfd.create();
  uffd.register(mapping.range(), { modes: ['missing'] });
  const handler = uffd.createHandler({
    fault(fault) {
      // A registered mapping's always has one.
      const { offset = 0 } = fault;
      fault.copy(bytes.subarray(offset, offset + mapping.pageSize));
    },
  });
  return async () => {
    await handler.close();
    uffd.close();
  };
};

/** All of it first, in pieces; then touched. */
async function filled(task: Task): Promise<Figures> {
  const { size } = statSync(task.image);
  using mapping = MemoryMapping.anonymous(size, { pages: 'small' });
  const { handles, close } = await bare(mapping, task.image, task);
  const filling = await bytesOf(native().floorFill(...handles, 2 * MiB));
  const figures = await touch(mapping, task);
  close();
  const total = figures.total + Number(filling.readBigUInt64LE(0)) / 1e6;
  return { ...figures, total, each: (total * 1e3) / (size / mapping.pageSize) };
}

/** A page for each call, unasked. */
async function called(task: Task, native4k: boolean): Promise<Figures> {
  const bytes = readFileSync(task.image);
  using mapping = MemoryMapping.anonymous(bytes.length, { pages: 'small' });
  const { uffd, handles, close } = await bare(mapping, task.image, task);
  const { pageSize } = mapping;
  const pages = mapping.length / pageSize;
  const total = native4k
    ? Number((await bytesOf(native().floorFill(...handles, pageSize))).readBigUInt64LE(0)) / 1e6
    : copied(uffd, mapping, bytes);
  const { sum } = await touch(mapping, { ...task, seed: 0 });
  close();
  const each = (total * 1e3) / pages;
  return { total, each, p50: each, p99: each, ...(sum === undefined ? {} : { sum }) };
}

function copied(uffd: Userfaultfd, mapping: MemoryMapping, bytes: Buffer): number {
  const { pageSize, length } = mapping;
  const works = Array.from({ length: length / pageSize }, (_, page) => ({
    range: mapping.range(page * pageSize, pageSize),
    source: bytes.subarray(page * pageSize, (page + 1) * pageSize),
  }));
  const start = performance.now();
  for (const { range, source } of works) uffd.tryCopy(range, source);
  return performance.now() - start;
}

/** A page is all a fault gets. */
const onePage = byPager(image => {
  const bytes = readFileSync(image);
  return { source: bufferSource(bytes), window: 4096 };
});

const WORKS: Readonly<Record<WorkName, (task: Task) => Promise<Figures>>> = {
  page: async task => served(task, onePage),
  pager: async task =>
    served(
      task,
      byPager(image => ({ source: fileSource(image) })),
    ),
  handler: async task => served(task, byCallback),
  call: async task => called(task, false),
  'floor-answer': async task => served(task, floorAnswer(task, false)),
  'floor-spin': async task => served(task, floorAnswer(task, true)),
  'floor-fill': filled,
  'floor-call': async task => called(task, true),
  mmap: async task => {
    using mapping = MemoryMapping.file(task.image);
    return await touch(mapping, task);
  },
};

/** Measures once. Before that the same, so that memory is warm on these CPUs and the program is compiled. */
export async function measure(task: Task): Promise<Figures> {
  const errno = native().pinThread(task.answerer);
  if (errno < 0) throw new Error(`this process may not run on CPU ${task.answerer} (errno ${-errno})`);
  await WORKS[task.work](task);
  return WORKS[task.work](task);
}
