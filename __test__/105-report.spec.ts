// What a report draws: where a fault is in the heat map, how high a column is, what is said beside them. Of faults that are made up.

import test from 'ava';

const PAGE = 4096;
const MiB = 1024 * 1024;

interface Fault {
  time: number;
  kind: string;
  write: boolean;
  offset: number;
  brought: { offset: number; length: number };
  latency: number;
}

interface Figures {
  heat: { columns: number; rows: number; cells: number[]; most: number };
  latencies: { from: number; to: number; count: number }[];
  misses?: object;
}

/** Not public. */
const part = async (name: string): Promise<unknown> =>
  import(new URL(`../../dist/src/cli/report/${name}.js`, import.meta.url).href);
const { figuresOf } = (await part('model')) as { figuresOf: (trace: object, replayed?: object) => Figures };
const { drawingsOf } = (await part('drawings')) as {
  drawingsOf: (figures: object) => { name: string; content: string; height: number }[];
};
const { bytes } = (await part('units')) as { bytes: (count: number) => string };

const IMAGE = 256 * MiB;

const fault = (time: number, offset: number, latency = 0.05): Fault => ({
  time,
  kind: 'missing',
  write: false,
  offset,
  brought: { offset, length: PAGE },
  latency,
});

const traceOf = (faults: readonly Fault[]): object => ({
  [Symbol.iterator]: () => faults[Symbol.iterator](),
  pageSize: PAGE,
  imageSize: IMAGE,
  identity: 'ab'.repeat(32),
  startedAt: new Date(0),
  length: faults.length,
  dropped: 0,
  end: 'complete',
});

/** A drawing, by how its name begins. */
function draw(name: string, faults: readonly Fault[], replayed?: readonly Fault[]): string {
  const figures = figuresOf(traceOf(faults), replayed && traceOf(replayed));
  return drawingsOf(figures).find(drawing => drawing.name.startsWith(name))?.content ?? '';
}

interface Part {
  x: number;
  y: number;
  height: number;
  opacity: number;
  title: string;
}

/** What is drawn; of what has a title. */
const partsOf = (drawing: string): Part[] =>
  [...drawing.matchAll(/<rect ([^>]*)><title>([^<]*)<\/title><\/rect>/g)].map(
    ([, words = '', title = '']) => {
      const number = (name: string): number =>
        Number(new RegExp(`\\b${name}="([^"]*)"`).exec(words)?.[1] ?? NaN);
      return {
        x: number('x'),
        y: number('y'),
        height: number('height'),
        opacity: number('fill-opacity'),
        title,
      };
    },
  );

const textsOf = (drawing: string): string[] =>
  [...drawing.matchAll(/<text[^>]*>([^<]*)<\/text>/g)].map(([, text = '']) => text);

const LAST = IMAGE - PAGE;
const RISING = [fault(0, 0), fault(0, 0), fault(100, LAST)];

test('in the heat map the image grows upwards, and the time to the right', t => {
  const { heat } = figuresOf(traceOf(RISING));

  t.is(heat.cells[(heat.rows - 1) * heat.columns], 2, 'the image begins below, at the left');
  t.is(heat.cells[heat.columns - 1], 1, 'and ends above, at the right');

  const parts = partsOf(draw('By place', RISING));
  const early = parts.find(({ title }) => title === '2 faults');
  const late = parts.find(({ title }) => title === '1 fault');
  t.is(parts.length, 2);
  t.true((early?.y ?? 0) - (late?.y ?? 0) > 300, 'a place further on in the image is higher on the page');
  t.true((late?.x ?? 0) - (early?.x ?? 0) > 700);
});

test('the colours of the heat map are explained by those of the counts that there are', t => {
  const faults = [1, 4, 12, 40].flatMap((count, at) =>
    Array.from({ length: count }, () => fault(at * 30, at * 60 * MiB)),
  );

  const drawing = draw('By place', faults);

  const explained = [
    ...drawing.matchAll(/<rect [^>]*fill-opacity="([\d.]+)"\/><text[^>]*>(\d+)<\/text>/g),
  ].map(([, opacity, count]) => [Number(count), Number(opacity)] as const);
  t.true(explained.length >= 3);
  t.deepEqual([explained[0]?.[0], explained.at(-1)?.[0]], [1, 40]);
  const drawn = partsOf(drawing).map(({ title, opacity }) => [Number.parseInt(title, 10), opacity] as const);
  t.deepEqual(
    drawn.map(([count]) => count).toSorted((a, b) => a - b),
    [1, 4, 12, 40],
  );
  for (const [count, opacity] of drawn) {
    const known = explained.find(([other]) => other === count);
    if (known) t.is(opacity, known[1], `${count} faults`);
  }
  t.is(drawn.find(([count]) => count === 40)?.[1], 1);
  t.true((drawn.find(([count]) => count === 1)?.[1] ?? 1) < 0.5);
});

test('a column of the latencies is as high as its count, and one fault is to be seen beside a thousand', t => {
  const counts = [
    [1000, 0.05],
    [500, 0.1],
    [250, 0.2],
    [1, 12],
  ] as const;
  const faults = counts.flatMap(([count, latency]) =>
    Array.from({ length: count }, (_, index) => fault(index, index * PAGE, latency)),
  );

  const parts = partsOf(draw('By latency', faults)).filter(({ height }) => height > 0);

  t.deepEqual(
    parts.map(({ title }) => title),
    [
      '32 µs to 64 µs: 1000 faults',
      '64 µs to 128 µs: 500 faults',
      '128 µs to 256 µs: 250 faults',
      '8.19 ms to 16.4 ms: 1 fault',
    ],
  );
  const [all = 0, half = 0, quarter = 0, one = 0] = parts.map(({ height }) => height);
  t.true(all > 100);
  t.true(
    Math.abs(half - all / 2) <= 0.1 && Math.abs(quarter - all / 4) <= 0.1,
    `${all}, ${half}, ${quarter}`,
  );
  t.is(one, 2);
  for (const { y, height } of parts) t.true(Math.abs(y + height - 194) < 0.2, 'they stand on the ground');
});

test('the tail of the latencies is told without pointing at it', t => {
  const many = Array.from({ length: 50 }, (_, index) => fault(index, index * PAGE));

  const bounded = textsOf(draw('By latency', [...many, fault(60, 0, 12)]));
  const endless = textsOf(draw('By latency', [...many, fault(60, 0, 60_000), fault(61, 0, 60_000)]));
  const nothing = textsOf(draw('By latency', []));

  t.true(bounded.includes('slowest: 1 fault, 8.19 ms to 16.4 ms'), bounded.join('; '));
  t.true(bounded.includes('16.4 ms'), 'where the axis ends');
  t.true(endless.includes('slowest: 2 faults, 4.19 s or more'), endless.join('; '));
  t.true(endless.includes('…'));
  t.deepEqual(nothing, ['faults', '1', '0']);
});

test('the growth is as high as what faults had brought by then', t => {
  const faults = [fault(0, 0), fault(50, PAGE), fault(100, 2 * PAGE), fault(100, 3 * PAGE)];

  const parts = partsOf(draw('Brought by faults', faults));

  const heightOf = (title: string): number =>
    parts.find(one => one.title.endsWith(`: ${title}`))?.height ?? 0;
  const whole = heightOf('16 KiB');
  t.true(whole > 100);
  t.true(Math.abs(heightOf('4 KiB') - whole / 4) <= 0.1);
  t.true(Math.abs(heightOf('8 KiB') - whole / 2) <= 0.1);
});

test('late faults stand below missed ones, each as high as their number', t => {
  const faults = [fault(0, 0), fault(0, PAGE), fault(0, 2 * PAGE), fault(100, 3 * PAGE)];

  const [late, missed, last] = partsOf(draw('Late and missed', faults, [fault(0, 0)]));

  t.regex(late?.title ?? '', /: 1 late$/);
  t.regex(missed?.title ?? '', /: 2 missed$/);
  t.regex(last?.title ?? '', /: 1 missed$/);
  t.true(Math.abs((missed?.height ?? 0) - 2 * (late?.height ?? 0)) <= 0.2);
  t.true(Math.abs((missed?.y ?? 0) + (missed?.height ?? 0) - (late?.y ?? 0)) <= 0.2);
  t.is(last?.height, late?.height);
});

test('what an axis counts is written at it', t => {
  for (const name of ['By place', 'Late and missed', 'By latency']) {
    t.true(textsOf(draw(name, RISING, RISING)).includes('faults'), name);
  }
  t.true(textsOf(draw('By place', RISING)).includes('256 MiB'));
  t.true(textsOf(draw('Brought by faults', RISING)).includes('8 KiB'));
});

test('a size fits beside a drawing', t => {
  const sizes = [0, 4096, 1023 * 1024, 1.5 * MiB, 99.9 * MiB, 256 * MiB, 1023.9 * MiB, 512 * 1024 * MiB];

  t.deepEqual(sizes.map(bytes), [
    '0 B',
    '4 KiB',
    '1023 KiB',
    '1.5 MiB',
    '99.9 MiB',
    '256 MiB',
    '1024 MiB',
    '512 GiB',
  ]);
});
