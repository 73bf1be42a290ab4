// `npm start`: makes what is missing, then restores a real memory image lazily into another process.

import { join } from 'node:path';
import { ensure, out, peer } from './ensure.mjs';

await ensure({ peer: true, tests: true });
process.env.UFFD_PEER = peer;
await import(join(out, 'examples', 'restore.js'));
