// `npm run soak [-- SEQUENCES [SEED]]`: makes what is missing, then plays random sequences (`__test__/soak/property.ts`).

import { join } from 'node:path';
import { ensure, out, peer } from './ensure.mjs';

await ensure({ peer: true, tests: true });
process.env.UFFD_PEER = peer;
await import(join(out, '__test__', 'soak', 'property.js'));
