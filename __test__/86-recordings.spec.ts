// `userfaultfd trace` and `report`, on recordings of sessions whose faults are known.

import { spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import test, { type ExecutionContext } from 'ava';
import { bufferSource, MemoryMapping, Pager, Trace } from 'userfaultfd';

import { canRun, folder, PAGE } from './helpers/serving.js';

const MAIN = fileURLToPath(new URL('../../dist/src/cli/main.js', import.meta.url));
const PAGES = 64;

function cli(...args: string[]): { status: number | null; stdout: string; stderr: string } {
  const { status, stdout, stderr } = spawnSync(process.execPath, [MAIN, ...args], {
    encoding: 'utf8',
    env: { ...process.env, NO_COLOR: '1' },
  });
  return { status, stdout, stderr };
}

/** A recording of a session in which these pages were touched, one after the other. */
async function recording(path: string, pages: readonly number[], replay?: string): Promise<string> {
  const pager = Pager.create();
  const mapping = MemoryMapping.anonymous(PAGES * PAGE);
  const source = bufferSource(new Uint8Array(PAGES * PAGE).fill(1));
  const session = await pager.serve(mapping, {
    source,
    record: path,
    window: PAGE,
    ...(replay === undefined ? {} : { replay }),
  });
  if (replay !== undefined) await session.replayed();
  for (const page of pages) await mapping.read(page * PAGE, 1);
  await session.stopRecording();
  await pager.close();
  mapping.close();
  return path;
}

async function two(t: ExecutionContext): Promise<{ place: string; one: string; other: string }> {
  const place = folder(t);
  return {
    place,
    one: await recording(join(place, 'one.trace'), [3, 9, 40]),
    other: await recording(join(place, 'other.trace'), [9, 40, 63]),
  };
}

test('trace merge and intersect write what any, and what all of the recordings wanted', async t => {
  if (!canRun(t)) return;
  const { place, one, other } = await two(t);
  const pagesOf = async (path: string): Promise<number[]> =>
    (await Trace.read(path))
      .ranges()
      .flatMap(({ offset, length }) =>
        Array.from({ length: length / PAGE }, (_, index) => offset / PAGE + index),
      );

  const merged = cli('trace', 'merge', one, other, '-o', join(place, 'all.trace'));
  const common = cli('trace', 'intersect', one, other, '-o', join(place, 'common.trace'));

  t.is(merged.status, 0, merged.stderr);
  t.is(common.status, 0, common.stderr);
  t.deepEqual(new Set(await pagesOf(join(place, 'all.trace'))), new Set([3, 9, 40, 63]));
  t.deepEqual(new Set(await pagesOf(join(place, 'common.trace'))), new Set([9, 40]));
  t.regex(merged.stdout, /all\.trace: 16 KiB of 256 KiB, of 2 recordings/);
});

test('trace show tells what is in a recording, for people and for programs', async t => {
  if (!canRun(t)) return;
  const { one } = await two(t);

  const words = cli('trace', 'show', one, '--faults');
  const { faults, workingSet, list } = JSON.parse(cli('trace', 'show', one, '--json', '--faults').stdout) as {
    faults: number;
    workingSet: number;
    list: { offset: number }[];
  };

  t.is(faults, 3);
  t.is(workingSet, 3 * PAGE);
  t.deepEqual(
    list.map(({ offset }) => offset),
    [3, 9, 40].map(page => page * PAGE),
  );
  t.regex(words.stdout, /^faults +3$/m);
  t.regex(words.stdout, /^working set +12 KiB \(4\.7 %\)$/m);
  t.regex(words.stdout, /0x3000 +4 KiB .* missing$/m);
});

test('the numbers of a report are those of the recording', async t => {
  if (!canRun(t)) return;
  const { place, one } = await two(t);
  const trace = await Trace.read(one);

  t.is(cli('report', one, '-o', join(place, 'out.html')).status, 0);

  const page = readFileSync(join(place, 'out.html'), 'utf8');
  const figures = JSON.parse(
    /<script type="application\/json" id="figures">(.*)<\/script>/.exec(page)?.[1] ?? '{}',
  ) as {
    faults: number;
    workingSet: number;
    identity: string;
    latency: { max: number };
    latencies: { count: number }[];
    heat: { cells: number[] };
    growth: number[];
    misses?: object;
  };
  const sum = (numbers: readonly number[]): number => numbers.reduce((all, number) => all + number, 0);
  t.is(figures.faults, trace.length);
  t.is(figures.workingSet, sum(trace.ranges().map(({ length }) => length)));
  t.is(figures.identity, trace.identity);
  t.is(figures.latency.max, Math.max(...Array.from(trace, ({ latency }) => latency)));
  t.is(sum(figures.latencies.map(({ count }) => count)), trace.length);
  t.is(sum(figures.heat.cells), trace.length);
  t.is(figures.growth.at(-1), figures.workingSet);
  t.deepEqual(
    figures.growth,
    figures.growth.toSorted((a, b) => a - b),
  );
  t.is(figures.misses, undefined, 'nothing was replayed');
  t.notRegex(page, /Late and missed/);
  t.notRegex(page.replaceAll(/xmlns="[^"]*"/g, ''), /https?:|src=|@import|url\(/, 'nothing is loaded');
});

test('a report of a session that replayed tells late faults from missed ones', async t => {
  if (!canRun(t)) return;
  const { place, one } = await two(t);
  const replaying = await recording(join(place, 'replaying.trace'), [3, 9, 40, 50], one);

  const { status, stderr } = cli('report', replaying, '--replayed', one, '-o', join(place, 'out.svg'));

  t.is(status, 0, stderr);
  const picture = readFileSync(join(place, 'out.svg'), 'utf8');
  t.regex(picture, /^<svg xmlns=/);
  t.regex(picture, /missed \(not in what was replayed\)<\/text><text[^>]*>1</);
  t.regex(picture, /late \(replayed, but wanted before\)<\/text><text[^>]*>0</);
  t.regex(
    picture,
    />Late and missed over time<[^]*<title>by [^<]+: 1 missed<\/title>[^]*>late: 0<[^]*>missed: 1</,
  );
});

test('what is no recording is refused by name, and nothing is written', async t => {
  const place = folder(t);
  const path = join(place, 'no.trace');
  writeFileSync(path, 'nothing of the kind');

  for (const args of [
    ['trace', 'show', path],
    ['report', path, '-o', join(place, 'out.html')],
    ['trace', 'merge', path, '-o', join(place, 'all.trace')],
  ]) {
    const { status, stderr } = cli(...args);
    t.is(status, 1, args.join(' '));
    t.regex(stderr, /^ERR_UFFD_TRACE: /, args.join(' '));
  }
  t.throws(() => readFileSync(join(place, 'out.html')));
});
