// Has a browser look at a report page (`look.mjs`), headless, out of npm; it is installed the first time.

import { execFileSync } from 'node:child_process';
import { join } from 'node:path';
import { nodeOf, npmCi } from '../consumer/nodes.mjs';
import { root } from '../paths.mjs';

/** What it has seen. Screenshots are left in the folder. */
export function look(page, folder) {
  const packages = join(root, '.cache/browser');
  npmCi(join(root, 'scripts/report-page'), packages);
  const seen = execFileSync(
    nodeOf('24'),
    [join(root, 'scripts/report-page/look.mjs'), page, folder, packages],
    { encoding: 'utf8', timeout: 120_000, maxBuffer: 64 * 1024 * 1024 },
  );
  return JSON.parse(seen);
}
