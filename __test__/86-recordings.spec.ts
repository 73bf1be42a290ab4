// `userfaultfd trace` and `report`, on recordings of sessions whose faults are known.

import { spawnSync } from 'node:child_process';
import { linkSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
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
async function recording(
  path: string,
  pages: readonly number[],
  { replay, fill = 1 }: { replay?: string; fill?: number } = {},
): Promise<string> {
  const pager = Pager.create();
  const mapping = MemoryMapping.anonymous(PAGES * PAGE);
  const source = bufferSource(new Uint8Array(PAGES * PAGE).fill(fill));
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
  t.regex(words.stdout, /^working set \(pages that faults brought\) +12 KiB \(4\.7 %\)$/m);
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
  const replaying = await recording(join(place, 'replaying.trace'), [3, 9, 40, 50], { replay: one });

  const { status, stdout, stderr } = cli(
    'report',
    replaying,
    '--replayed',
    one,
    '-o',
    join(place, 'out.svg'),
  );

  t.is(status, 0, stderr);
  t.regex(stdout, /: 1 fault brought 4 KiB; working set with what was replayed: 16 KiB\n$/);
  const picture = readFileSync(join(place, 'out.svg'), 'utf8');
  t.regex(picture, /^<svg xmlns=/);
  t.regex(picture, /missed \(not in what was replayed\)<\/text><text[^>]*>1</);
  t.regex(picture, /late \(replayed, but wanted before\)<\/text><text[^>]*>0</);
  t.regex(
    picture,
    />Late and missed over time<[^]*<title>by [^<]+: 1 missed<\/title>[^]*>late: 0<[^]*>missed: 1</,
  );
});

test('the working set of a session that replayed is not taken for what faults brought', async t => {
  if (!canRun(t)) return;
  const { place, one } = await two(t);
  const replaying = await recording(join(place, 'replaying.trace'), [3, 9, 40, 50], { replay: one });
  const textOf = (...args: string[]): string => {
    const { status, stderr } = cli('report', replaying, ...args, '-o', join(place, 'out.svg'));
    t.is(status, 0, stderr);
    return readFileSync(join(place, 'out.svg'), 'utf8');
  };

  const alone = textOf();
  const told = textOf('--replayed', one);

  // Four pages were used, and all but the last were replayed.
  t.regex(alone, />working set \(pages that faults brought\)<\/text><text[^>]*>4 KiB \(1\.6 %\)</);
  t.regex(told, />working set, all that was replayed included<\/text><text[^>]*>16 KiB \(6\.3 %\)</);
  t.regex(told, />replayed<\/text><text[^>]*>12 KiB</);
  t.regex(told, />pages that faults brought<\/text><text[^>]*>4 KiB</);
  for (const picture of [alone, told]) {
    t.notRegex(picture, /Working set over time/);
    t.regex(picture, />Brought by faults over time<[^]*<title>by [^<]+: 4 KiB<\/title>/);
  }
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

test('a recording made of others may replace one of them', async t => {
  if (!canRun(t)) return;
  const { place, one, other } = await two(t);

  const { status, stderr } = cli('trace', 'merge', one, other, '-o', one);

  t.is(status, 0, stderr);
  const pages = (await Trace.read(one)).ranges().map(({ offset }) => offset / PAGE);
  t.deepEqual(
    pages.toSorted((a, b) => a - b),
    [3, 9, 40, 63],
  );
  t.deepEqual(readdirSync(place).toSorted(), ['one.trace', 'other.trace']);
});

test('a report is written to .html and .svg only, and never over what it is made of', async t => {
  if (!canRun(t)) return;
  const { place, one, other } = await two(t);
  const link = join(place, 'link.html');
  const hard = join(place, 'hard.svg');
  symlinkSync(one, link);
  linkSync(other, hard);
  const before = [one, other].map(path => readFileSync(path));

  for (const [output, more] of [
    [one, []],
    [join(place, 'out.pdf'), []],
    [join(place, 'out'), []],
    [link, []],
    [hard, ['--replayed', other]],
  ] as const) {
    const { status, stderr } = cli('report', one, '-o', output, ...more);
    t.is(status, 1, output);
    t.regex(stderr, /^ERR_INVALID_ARG_VALUE: Expected `--output` to .+, got '.+'\n$/, output);
  }

  t.deepEqual(
    [one, other].map(path => readFileSync(path)),
    before,
  );
  t.deepEqual(readdirSync(place).toSorted(), ['hard.svg', 'link.html', 'one.trace', 'other.trace']);
});

test('the ending of a report says what it is, in small letters or capitals, and replaces a report as a whole', async t => {
  if (!canRun(t)) return;
  const { place, one } = await two(t);
  const page = join(place, 'A.HTML');
  const picture = join(place, 'A.SVG');
  const old = 'x'.repeat(1 << 20);
  writeFileSync(page, old);
  // Who has the old one open, or another name for it, keeps it: it is not written into.
  linkSync(page, join(place, 'kept'));

  t.is(cli('report', one, '-o', page).status, 0);
  t.is(cli('report', one, '-o', picture).status, 0);

  t.regex(readFileSync(page, 'utf8'), /^<!doctype html>[^]*<\/html>\n$/);
  t.regex(readFileSync(picture, 'utf8'), /^<svg [^]*<\/svg>\n$/);
  t.is(readFileSync(join(place, 'kept'), 'utf8'), old);
  t.is(readdirSync(place).length, 5);
});

test('what of a report is not there is named, with what to do', async t => {
  if (!canRun(t)) return;
  const { place, one } = await two(t);
  const nowhere = join(place, 'no', 'where.html');
  const missing = join(place, 'no.trace');

  const unwritten = cli('report', one, '-o', nowhere);
  const unread = cli('report', missing, '-o', join(place, 'out.html'));
  const unknown = cli('report', one, '--replayed', missing, '-o', join(place, 'out.html'));

  t.deepEqual(
    [unwritten, unread, unknown].map(({ status }) => status),
    [1, 1, 1],
  );
  t.is(
    unwritten.stderr,
    `ERR_UFFD_SYSTEM: ${nowhere} could not be written: ENOENT: no such file or directory
There is no folder ${join(place, 'no')}: make it, or name another one with --output.\n`,
  );
  for (const { stderr } of [unread, unknown]) {
    t.true(stderr.startsWith(`ERR_UFFD_TRACE: open of recording ${missing}: ENOENT`), stderr);
    t.regex(stderr, /\nA recording has its name when its session has ended, .*\n$/);
  }
  t.deepEqual(readdirSync(place).toSorted(), ['one.trace', 'other.trace']);
});

test('recordings of different images are not mixed, and both are named', async t => {
  if (!canRun(t)) return;
  const { place, one, other } = await two(t);
  const foreign = await recording(join(place, 'foreign.trace'), [3], { fill: 2 });

  for (const args of [
    ['report', one, '--replayed', foreign, '-o', join(place, 'out.html')],
    ['trace', 'merge', one, other, foreign, '-o', join(place, 'out.html')],
    ['trace', 'intersect', one, other, foreign, '-o', join(place, 'out.html')],
  ]) {
    const { status, stderr } = cli(...args);
    t.is(status, 1, args.join(' '));
    const start = `ERR_UFFD_TRACE_IMAGE: ${foreign} is of another image (`;
    t.is(stderr.slice(0, start.length), start);
    t.regex(stderr, new RegExp(` than ${one} \\([0-9a-f]{16}, 256 KiB\\)\n`));
  }
  t.deepEqual(readdirSync(place).toSorted(), ['foreign.trace', 'one.trace', 'other.trace']);
});
