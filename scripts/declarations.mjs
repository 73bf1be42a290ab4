// The last step of `npm run build:ts`: the declarations name the addon's types by path. `#native` is resolved by the package's
// `imports`, which TypeScript's older ways of resolving modules do not read; and it is nobody's business outside.

import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { dist, root } from './paths.mjs';

for (const name of readdirSync(dist, { recursive: true })) {
  if (!name.endsWith('.d.ts')) continue;
  const file = join(dist, name);
  const text = readFileSync(file, 'utf8');
  const path = relative(dirname(file), join(root, 'native.cjs'));
  const named = text.replaceAll(/(?<=from |import\()(['"])#native\1/g, `'${path}'`);
  if (named !== text) writeFileSync(file, named);
}
