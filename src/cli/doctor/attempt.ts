/** The program of the process in which things are tried (`attempts.ts`). */

import { writeSync } from 'node:fs';
import process from 'node:process';

import { attempt } from './attempts.js';

// At once, and not when the event loop turns: the next one may end the process.
attempt(process.argv.slice(2), line => writeSync(1, line));
