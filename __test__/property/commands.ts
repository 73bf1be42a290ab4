/** What may happen, in any order. */

import * as fc from 'fast-check';

import { PAGES } from './image.js';
import { type Access, type Guest, type Kind, type Model, POLICIES, type Policy } from './model.js';
import type { Rig } from './rig.js';

type Command = fc.AsyncCommand<Model, Rig>;
type Arbitrary = fc.Arbitrary<Command>;

/** Daemons that are ended in one sequence. */
const MOST_DEATHS = 8;
const MOST_GUESTS = 5;

function command(
  name: string,
  words: string,
  may: (model: Readonly<Model>) => boolean,
  act: (model: Model, rig: Rig) => Promise<void> | void,
): Command {
  return {
    check: may,
    async run(model, rig) {
      model.done.push(name);
      await act(model, rig);
      rig.check();
    },
    toString: () => `${name}${words}`,
  };
}

/** One that concerns a guest that is alive. */
function ofGuest(
  number: number,
  name: string,
  words: string,
  may: (model: Readonly<Model>, guest: Guest) => boolean,
  act: (model: Model, rig: Rig, guest: Guest) => Promise<void> | void,
): Command {
  return command(
    name,
    ` (guest ${number})${words}`,
    model => {
      const guest = model.guest(number);
      return guest !== undefined && may(model, guest);
    },
    async (model, rig) => {
      const guest = model.guest(number);
      if (guest) await act(model, rig, guest);
    },
  );
}

const guest = fc.nat(MOST_GUESTS - 1);
const page = fc.nat(PAGES - 1);
const policy = fc.constantFrom<Policy>(...POLICIES);

/** Which guests there are. */
export const kind: fc.Arbitrary<Kind> = fc.record({
  source: fc.constantFrom('file', 'js'),
  policy,
});

const touch: Arbitrary = fc
  .record({
    guest,
    pages: fc.uniqueArray(page, { minLength: 1, maxLength: 8 }),
    how: fc.constantFrom<Access['how']>('look', 'look', 'look', 'peek'),
    wait: fc.boolean(),
  })
  .map(({ guest: number, pages, how, wait }) =>
    ofGuest(
      number,
      how,
      ` ${pages.join(' ')}${wait ? ' and wait' : ''}`,
      () => true,
      async (model, rig, whose) => {
        const all = pages.map(one => rig.touch(model, whose, one, how));
        if (wait) await rig.settle(model, all);
      },
    ),
  );

const discard: Arbitrary = fc
  .record({ guest, first: page, count: fc.integer({ min: 1, max: 6 }), wait: fc.boolean() })
  .map(({ guest: number, first, count, wait }) => {
    const pages = Array.from({ length: Math.min(count, PAGES - first) }, (_, at) => first + at);
    return ofGuest(
      number,
      'discard',
      ` ${pages.join(' ')}${wait ? ' and wait' : ''}`,
      () => true,
      async (model, rig, whose) => {
        const one = rig.discard(model, whose, pages);
        if (wait) await rig.settle(model, [one]);
      },
    );
  });

const startGuest: Arbitrary = kind.map(wanted =>
  command(
    'start a guest',
    `: ${wanted.source}, ${wanted.policy}`,
    model => {
      const good =
        wanted.source === 'js' ? model.nodeAlive && model.js === 'good' : !model.broken.has(wanted.policy);
      return good && model.alive.length < MOST_GUESTS;
    },
    async (model, rig) => rig.startGuest(model, wanted),
  ),
);

const killGuest: Arbitrary = guest.map(number =>
  ofGuest(
    number,
    'kill a guest',
    '',
    () => true,
    async (_, rig, whose) => rig.killGuest(whose),
  ),
);

const killDaemon = (withHeir: boolean): Arbitrary =>
  fc.constant(
    command(
      withHeir ? 'kill the daemon and its heir' : 'kill the daemon',
      '',
      model => model.deaths < MOST_DEATHS,
      async (model, rig) => rig.killDaemon(model, withHeir),
    ),
  );

const killHeir: Arbitrary = fc.constant(
  command(
    'kill the heir',
    '',
    () => true,
    async (_, rig) => rig.killHeir(),
  ),
);

const killNode: Arbitrary = fc.constant(
  command(
    'kill Node',
    '',
    model => model.nodeAlive && model.node < 3,
    async (model, rig) => rig.killNode(model),
  ),
);

const startNode: Arbitrary = fc.constant(
  command(
    'start Node',
    '',
    model => !model.nodeAlive,
    async (model, rig) => rig.startNode(model),
  ),
);

const upgrade: Arbitrary = fc.constant(
  command(
    'upgrade',
    '',
    model => model.nodeAlive && model.deaths < MOST_DEATHS,
    async (model, rig) => rig.upgrade(model),
  ),
);

const setSource: Arbitrary = fc.constantFrom<Model['js']>('slow', 'failing', 'good').map(mode =>
  command(
    `source ${mode}`,
    '',
    model => model.nodeAlive && model.js !== mode,
    async (model, rig) => rig.setSource(model, mode),
  ),
);

const breakFile: Arbitrary = policy.map(whose =>
  command(
    'break a file',
    `: ${whose}`,
    model => !model.broken.has(whose),
    (model, rig) => rig.breakFile(model, whose),
  ),
);

const mendFile: Arbitrary = policy.map(whose =>
  command(
    'mend a file',
    `: ${whose}`,
    model => model.broken.has(whose),
    (model, rig) => rig.mendFile(model, whose),
  ),
);

const hold: Arbitrary = guest.map(number =>
  ofGuest(
    number,
    'hold',
    '',
    (model, { failed }) => model.nodeAlive && !failed,
    async (model, rig, whose) => rig.hold(model, whose),
  ),
);

const resume: Arbitrary = fc
  .record({ guest, from: fc.constantFrom('same' as const, 'same' as const, 'spare' as const, 'js' as const) })
  .map(({ guest: number, from }) =>
    ofGuest(
      number,
      'resume',
      ` from ${from}`,
      (model, { failed }) => model.nodeAlive && !failed,
      async (model, rig, whose) => rig.resume(model, whose, from),
    ),
  );

const settle: Arbitrary = fc.constant(
  command(
    'wait for everybody',
    '',
    () => true,
    async (model, rig) => rig.settle(model),
  ),
);

const often = (times: number, one: Arbitrary): Arbitrary[] => Array.from({ length: times }, () => one);

/** Those that are there more than once are drawn more often. */
export const commands: Arbitrary[] = [
  ...often(5, touch),
  ...often(3, discard),
  ...often(2, hold),
  ...often(2, resume),
  ...often(2, killDaemon(false)),
  ...often(2, setSource),
  killDaemon(true),
  killHeir,
  upgrade,
  killNode,
  startNode,
  breakFile,
  mendFile,
  killGuest,
  startGuest,
  settle,
];
