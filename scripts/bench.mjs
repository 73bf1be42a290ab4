// `npm run bench`: makes what is missing, then runs the benchmark with the words it was given.

import { join } from 'node:path';
import { ensure, out, peer } from './ensure.mjs';

// Standard output is the benchmark's: with --json, every line of it is an object.
await ensure({ peer: true, tests: true, output: process.stderr });
process.env.UFFD_PEER = peer;
await import(join(out, 'benchmark', 'main.js'));
