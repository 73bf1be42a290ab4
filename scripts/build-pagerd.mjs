// `npm run build:native`, second half: the executable beside the addon.

import { copyFileSync, renameSync } from 'node:fs';
import { join } from 'node:path';
import { execFileSync } from 'node:child_process';
import { root, targetDir } from './paths.mjs';

execFileSync('cargo', ['build', '--quiet', '--release', '--package', 'pagerd'], {
  cwd: root,
  stdio: 'inherit',
});
// Renamed into its place: one that is running cannot be written over.
const made = join(root, 'userfaultfd-pagerd.new');
copyFileSync(join(targetDir, 'release', 'userfaultfd-pagerd'), made);
renameSync(made, join(root, 'userfaultfd-pagerd'));
