// What sessions count and measure, and how a program hears of it.

import { execFileSync } from 'node:child_process';
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import { once } from 'node:events';
import { setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

import test from 'ava';
import {
  bufferSource,
  callbackSource,
  LatencyHistogram,
  MemoryMapping,
  Pager,
  type Session,
  type SessionStats,
} from 'userfaultfd';

import { mapped, PAGE, pageOf } from './helpers/faults.js';
import { canRun, counted, serving } from './helpers/serving.js';

const PAGES = 32;
const METRICS = fileURLToPath(new URL('../examples/metrics.js', import.meta.url));

test('every fault has its turn, its read and its installing measured', async t => {
  if (!canRun(t)) return;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  await using pager = Pager.create();
  const session = await pager.serve(mapping, { source: bufferSource(pageOf(7, PAGES)), window: PAGE });

  for (let page = 0; page < PAGES; page += 1) await mapping.read(page * PAGE, 1);
  await session.close({ rest: 'zero' });

  const { faults, windows, busyMs, pagesPrefetched, latencies } = session.stats();
  const { queue, source, install, prefetchSource, prefetchInstall } = latencies;
  t.is(queue.count, faults);
  t.deepEqual([source.count, install.count], [windows, windows]);
  t.is(windows, PAGES);
  t.true(source.sum > 0 && install.sum > 0);
  // Whole nanoseconds, of which milliseconds are no exact sum.
  t.true(Math.round((source.sum + install.sum) * 1e6) <= Math.round(busyMs * 1e6));
  t.is(install.mean, install.sum / PAGES);
  t.deepEqual([pagesPrefetched, prefetchSource.count, prefetchInstall.count], [0, 0, 0]);
  t.deepEqual([prefetchSource.mean, prefetchSource.percentile(50)], [Number.NaN, Number.NaN]);
});

test('a slow source is seen where it is slow, in milliseconds', async t => {
  if (!canRun(t)) return;
  const slow = 40;
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  await using pager = Pager.create();
  const answer = async (_: number, length: number): Promise<Uint8Array> => {
    // A timer may be up to a millisecond early.
    await setTimeout(slow + 1);
    return Buffer.alloc(length, 1);
  };
  const source = callbackSource(answer, { size: PAGES * PAGE, chunk: PAGE });
  const session = await pager.serve(mapping, { source, window: PAGE });

  await mapping.read(0, 1);
  await counted(session, 1);
  const { latencies } = session.stats();
  await session.close({ rest: 'populate' });

  t.is(latencies.source.count, 1);
  t.true(latencies.source.percentile(1) >= slow, JSON.stringify(latencies));
  t.true(latencies.source.sum >= slow);
  t.true(latencies.queue.sum < slow && latencies.install.sum < slow, JSON.stringify(latencies));
  const after = session.stats();
  t.is(after.pagesPrefetched, PAGES - 1);
  t.is(after.latencies.prefetchInstall.count, after.latencies.prefetchSource.count);
  t.true(after.latencies.prefetchSource.percentile(100) >= slow);
  t.is(after.latencies.source.count, 1);
});

test('a percentile is the bound below which so many stayed', t => {
  // 100 values: 50 in the first bucket, 49 in the ninth, one in the last, which has no bound.
  const words = new Float64Array(115);
  words.set([50], 0);
  words.set([49], 8);
  words.set([1], 113);
  words.set([5e6], 114);
  const histogram = new LatencyHistogram(words);

  const buckets = histogram.buckets();
  t.is(buckets.length, 114);
  t.deepEqual([buckets[0]?.below, buckets.at(-1)?.below], [256e-6, Infinity]);
  for (const [index, { below }] of buckets.entries()) {
    if (index >= 4 && index < 113) t.is(below, 2 * (buckets[index - 4]?.below ?? 0), `bucket ${index}`);
  }
  t.is(histogram.count, 100);
  t.is(histogram.sum, 5);
  t.is(histogram.mean, 0.05);
  const percentiles = [0, 1, 50, 51, 99, 99.5, 100].map(percent => histogram.percentile(percent));
  const [first = 0, ninth = 0] = [buckets[0]?.below, buckets[8]?.below];
  t.deepEqual(percentiles, [first, first, first, ninth, ninth, Infinity, Infinity]);
  t.deepEqual(JSON.parse(JSON.stringify(histogram)), { count: 100, mean: 0.05, p50: first, p99: ninth });
  for (const percent of [-1, 100.5, Number.NaN]) {
    t.throws(() => histogram.percentile(percent), { code: 'ERR_OUT_OF_RANGE' });
  }
  t.throws(() => histogram.percentile('50' as unknown as number), { code: 'ERR_INVALID_ARG_TYPE' });
});

test.serial('counters are told now and then, and for the last time when the session has ended', async t => {
  if (!canRun(t)) return;
  const heard: unknown[] = [];
  const listen = (message: unknown): void => void heard.push(message);
  subscribe('userfaultfd:session:stats', listen);
  t.teardown(() => unsubscribe('userfaultfd:session:stats', listen));
  const mapping = mapped(t, MemoryMapping.anonymous(PAGES * PAGE));
  const pager = Pager.create({ statsInterval: 10 });
  const told: { session: Session; stats: SessionStats }[] = [];
  pager.on('stats', (session, stats) => void told.push({ session, stats }));
  const session = await pager.serve(mapping, { source: bufferSource(pageOf(7, PAGES)), window: PAGE });

  while (told.length < 2) await setTimeout(1);
  await mapping.read(0, PAGE);
  const before = told.length;
  while (told.length < before + 2) await setTimeout(1);
  await session.close({ rest: 'zero' });
  const last = told.at(-1);
  const count = told.length;
  await pager.close();
  await setTimeout(30);

  t.is(told.length, count, 'nothing is told after the end');
  t.true(told.every(one => one.session === session));
  t.is(told[0]?.stats.faults, 0);
  t.is(told[before + 1]?.stats.faults, 1);
  t.is(last?.stats, session.stats());
  t.deepEqual(heard, told);
});

test('a server tells the counters of its sessions too; without an interval nobody does', async t => {
  if (!canRun(t)) return;
  const { server, connect } = await serving(t, { statsInterval: 10 });
  const quiet = await serving(t);
  quiet.server.on('stats', () => t.fail('nobody asked for these'));

  const { session } = await connect();
  const other = await quiet.connect();
  const [first] = (await once(server, 'stats')) as [Session, SessionStats];
  t.is(first, session);
  const ended = new Promise<SessionStats>(resolve => {
    server.on('stats', (_, stats) => {
      if (stats === session.stats()) resolve(stats);
    });
  });
  await session.close();
  await other.session.close();

  t.is(await ended, session.stats());
});

test('an interval that cannot be is refused', t => {
  for (const statsInterval of [9, 0, -1, 1.5, 2 ** 31, Number.NaN]) {
    t.throws(() => Pager.create({ statsInterval }), { code: 'ERR_OUT_OF_RANGE' }, `${statsInterval}`);
  }
  t.throws(() => Pager.create({ statsInterval: '100' as unknown as number }), {
    code: 'ERR_INVALID_ARG_TYPE',
  });
});

test('the example exports what sessions have counted, for Prometheus', t => {
  if (!canRun(t)) return;

  const text = execFileSync(process.execPath, [METRICS], { encoding: 'utf8', timeout: 30_000 });
  const values = new Map<string, number>();
  for (const line of text.split('\n').filter(one => one !== '' && !one.startsWith('#'))) {
    const [, name = '', value] = /^(\S+) (\S+)$/.exec(line) ?? [];
    values.set(name, Number(value));
  }

  const sum = (name: string): number =>
    [...values].reduce((total, [key, value]) => total + (key.startsWith(`${name}{`) ? value : 0), 0);
  const faults = sum('userfaultfd_faults_total');
  t.is(values.get('userfaultfd_faults_total{outcome="installed"}'), 32);
  t.true((values.get('userfaultfd_pages_total{outcome="installed"}') ?? 0) >= 32);
  t.is(values.get('userfaultfd_queue_seconds_count'), faults);
  for (const part of ['queue', 'source', 'install']) {
    const name = `userfaultfd_${part}_seconds`;
    const buckets = [...values].filter(([key]) => key.startsWith(`${name}_bucket`)).map(([, value]) => value);
    t.is(buckets.length, 30);
    t.deepEqual(
      buckets,
      buckets.toSorted((a, b) => a - b),
      'cumulative',
    );
    t.is(values.get(`${name}_bucket{le="+Inf"}`), values.get(`${name}_count`));
    t.true((values.get(`${name}_sum`) ?? 0) > 0);
  }
});
