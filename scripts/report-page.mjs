// The report page in a real browser: it renders without loading anything, the numbers on it are those of the recording, and it can be
// read on a telephone and in the dark. Needs a built library. Screenshots are left in `out/report`.

import assert from 'node:assert/strict';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { dist, out } from './paths.mjs';
import { look } from './report-page/browser.mjs';

const PAGE = 4096;
const load = async name => import(pathToFileURL(join(dist, 'src/cli/report', `${name}.js`)).href);

/** A recording whose figures can be said without the code that is tested: 400 pages, each of them once, 2 ms and 1 MiB apart. */
function* faults(count = 400) {
  for (let index = 0; index < count; index += 1) {
    const offset = ((index * 37) % 1000) * 256 * PAGE;
    const latency = index === 399 ? 12 : index >= 395 ? 0.1298 : 0.05;
    yield {
      time: index * 2,
      kind: 'missing',
      write: index % 4 === 0,
      offset,
      brought: { offset, length: PAGE },
      latency,
    };
  }
}

/** What was replayed: the pages of the first quarter of the time, and as many that no fault asked for. */
const REPLAYED = 100;
const replayed = {
  *[Symbol.iterator]() {
    yield* [...faults(400 + REPLAYED)].filter((_, index) => index < REPLAYED || index >= 400);
  },
};
const trace = {
  [Symbol.iterator]: () => faults(),
  pageSize: PAGE,
  imageSize: 1000 * 256 * PAGE,
  identity: 'ab'.repeat(32),
  startedAt: new Date(0),
  length: 400,
  dropped: 0,
  end: 'complete',
};
const EXPECTED = {
  faults: '400',
  'of these writes': '100',
  'working set, all that was replayed included': '2.0 MiB (0.2 %)',
  replayed: '800 KiB',
  'pages that faults brought': '1.6 MiB',
  image: '1000 MiB',
  'brought by faults, each time counted': '1.6 MiB',
  'time to the last fault': '798 ms',
  'latency p50': '50 µs',
  'latency p90': '50 µs',
  'latency p99': '130 µs',
  'latency max': '12 ms',
  'late (replayed, but wanted before)': '100',
  'missed (not in what was replayed)': '300',
};

const { figuresOf } = await load('model');
const { htmlReport } = await load('html');
const folder = join(out, 'report');
mkdirSync(folder, { recursive: true });
const page = join(folder, 'report.html');
writeFileSync(page, htmlReport(figuresOf(trace, replayed), 'run <1>.trace'));
const seen = look(page, folder);

assert.deepEqual(seen.troubles, [], 'the browser complains');
assert.deepEqual(
  new Set(seen.requests),
  new Set([pathToFileURL(page).href]),
  'nothing but the page is loaded',
);
for (const [name, view] of Object.entries(seen.views)) {
  assert.deepEqual(view.facts, EXPECTED, name);
  assert.equal(view.figures.faults, 400);
  assert.ok(
    view.scrollWidth <= view.width,
    `${name}: ${view.scrollWidth} pixels in a window of ${view.width}`,
  );
  for (const contrast of view.contrasts)
    assert.ok(contrast >= 4.5, `${name}: a contrast of ${contrast.toFixed(1)}`);
  checkNumbers(name, view.drawings);
  for (const drawing of view.drawings) {
    for (const part of [...drawing.cells, ...drawing.texts]) {
      const inside =
        part.x >= drawing.x - 1 &&
        part.y >= drawing.y - 1 &&
        part.x + part.width <= drawing.x + drawing.width + 1 &&
        part.y + part.height <= drawing.y + drawing.height + 1;
      assert.ok(
        inside,
        `${name}: ${JSON.stringify(part)} lies outside of its drawing ${JSON.stringify({ ...drawing, cells: 0, texts: 0 })}`,
      );
    }
    for (const { height, text } of drawing.texts)
      assert.ok(height >= 9, `${name}: “${text}” is ${height} pixels high`);
    for (const [index, one] of drawing.texts.entries())
      for (const other of drawing.texts.slice(index + 1)) {
        const apart =
          one.x + one.width <= other.x ||
          other.x + other.width <= one.x ||
          // Letters are lower than the line that they stand on.
          Math.abs(one.y - other.y) >= 0.8 * one.height;
        assert.ok(apart, `${name}: “${one.text}” lies over “${other.text}”`);
      }
  }
}

/** What the parts of the drawings say they are is what the recording has; and they are as large as that. */
function checkNumbers(view, drawings) {
  const [heat, growth, misses, bars] = drawings.map(({ cells }) => cells);
  assert.equal(drawings.length, 4, view);
  const sum = (cells, pattern) =>
    cells.reduce((all, { title }) => all + Number(pattern.exec(title)?.[1] ?? 0), 0);
  assert.equal(sum(heat, /^(\d+) faults?$/), 400, `${view}: heat map`);
  assert.equal(sum(bars, /: (\d+) faults?$/), 400, `${view}: latencies`);

  // The place grows upwards, and the time to the right: each run through the image rises.
  const middle = ({ y, height }) => (y + height / 2 - drawings[0].y) / drawings[0].height;
  const first = heat.filter(({ x }) => x === Math.min(...heat.map(cell => cell.x)));
  assert.ok(
    first.every(cell => middle(cell) > 0.7),
    `${view}: the first faults are at the image's beginning, which is below`,
  );
  // 395 faults, 4 and 1 of 0.05, 0.13 and 12 ms: as high as that, and where few are to be seen, two of the drawing's pixels.
  const scale = drawings[3].width / 960;
  const columns = bars.filter(({ height }) => height > 0);
  const [most, few, one] = columns.map(({ height }) => height / scale);
  assert.deepEqual(
    columns.map(({ title }) => title),
    ['32 µs to 64 µs: 395 faults', '128 µs to 256 µs: 4 faults', '8.19 ms to 16.4 ms: 1 fault'],
    view,
  );
  assert.ok(
    most > 120 && Math.abs(few - 2) < 0.3 && Math.abs(one - 2) < 0.3,
    `${view}: heights of latencies`,
  );
  const texts = drawings.map(drawing => drawing.texts.map(({ text }) => text));
  assert.ok(texts[3].includes('slowest: 1 fault, 8.19 ms to 16.4 ms'), `${view}: the tail is told in words`);
  assert.equal(texts[3].filter(text => text === '16.4 ms').length, 1, `${view}: and at the axis`);
  for (const index of [0, 2, 3]) assert.ok(texts[index].includes('faults'), `${view}: counts have a unit`);
  assert.ok(texts[0].includes('1'), `${view}: the colours of the heat map are explained`);

  assert.deepEqual(
    [growth[47], growth.at(-1)].map(({ title }) => title),
    ['by 399 ms: 800 KiB', 'by 798 ms: 1.6 MiB'],
    view,
  );
  const [half, all] = [growth[47], growth.at(-1)].map(({ height }) => height);
  assert.ok(Math.abs(half / all - 0.5) < 0.02, `${view}: half of the working set by half of the time`);
  for (const [index, { height }] of growth.entries())
    assert.ok(height >= (growth[index - 1]?.height ?? 0), `${view}: it does not shrink`);

  assert.equal(sum(misses, /: (\d+) late$/), REPLAYED, `${view}: late`);
  assert.equal(sum(misses, /: (\d+) missed$/), 400 - REPLAYED, `${view}: missed`);
  const lates = misses.filter(({ title }) => title.endsWith('late'));
  const quarter = (misses[0].x + misses.at(-1).x) / 2 - (misses.at(-1).x - misses[0].x) / 4;
  assert.ok(
    lates.every(({ x }) => x <= quarter + misses[0].width),
    `${view}: late in the first quarter only`,
  );
}

const brightness = name => Math.max(...seen.views[name].background);
assert.ok(brightness('desktop') > 200 && brightness('dark') < 60, 'the background follows the scheme');
process.stdout.write(`ok: ${Object.keys(seen.views).join('; ')}\n`);
