// Where things are. Everything else in this folder takes its paths from here, so that a command
// behaves the same from whatever folder it was started in.

import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = fileURLToPath(new URL('..', import.meta.url));

/** Cargo's output folder: `CARGO_TARGET_DIR` as cargo reads it, relative to where cargo is run (the root). */
export const targetDir = resolve(root, process.env.CARGO_TARGET_DIR || 'target');

/** The executable that tests and `npm start` page for. */
export const peer = join(targetDir, 'release', 'userfaultfd-peer');

export const dist = join(root, 'dist');
export const out = join(root, 'out');
export const logs = join(out, 'logs');

/** What `ensure` remembers of its last builds. */
export const stamps = join(root, '.cache');

/** The name of an executable that an installed npm package brings. */
export const bin = name => join(root, 'node_modules', '.bin', name);
