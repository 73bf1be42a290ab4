/** Every case, in the order in which they run. */

import type { Case } from '../harness/case.js';
import { calls } from './calls.js';
import { coldCache } from './cold.js';
import { demand } from './demand.js';
import { faults } from './faults.js';
import { handler } from './handler.js';
import { hugeFill } from './huge-fill.js';
import { modes } from './modes.js';
import { population } from './population.js';
import { recording } from './recording.js';
import { coldReplay, demandInReplay, slowReplay } from './replay.js';
import { scan } from './scan.js';
import { sessions } from './sessions.js';
import { sharing } from './sharing.js';
import { statistics } from './statistics.js';
import { wholeImage } from './whole-image.js';

/** What `npm run bench` runs. */
export const CASES: readonly Case[] = [
  faults,
  wholeImage,
  coldCache,
  population,
  hugeFill,
  demand,
  modes,
  slowReplay,
  coldReplay,
  demandInReplay,
  sessions,
  sharing,
  statistics,
  recording,
  scan,
  calls,
  handler,
];
