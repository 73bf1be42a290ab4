/** The programs that the benchmark builds for itself: the floor in C, the rivals and the pager's own programs in Rust. */

import { execFileSync } from 'node:child_process';
import { mkdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** The repository. */
export const ROOT: string = fileURLToPath(new URL('../../..', import.meta.url));
/** What is built or made once. */
export const CACHE: string = join(ROOT, '.cache');

const FLOOR = join(ROOT, 'benchmark', 'floor');
const changed = (path: string): number => statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0;
const made = new Map<string, string>();

/** Builds at its first use in this process. */
function once(name: string, build: () => string): string {
  const known = made.get(name);
  if (known !== undefined) return known;
  const path = build();
  made.set(name, path);
  return path;
}

/** `floor/NAME.c`, built. */
export function floor(name: string): string {
  return once(`floor ${name}`, () => {
    mkdirSync(CACHE, { recursive: true });
    const [source, program] = [join(FLOOR, `${name}.c`), join(CACHE, `floor-${name}`)];
    if (changed(program) < Math.max(changed(source), changed(join(FLOOR, 'common.h')))) {
      execFileSync('cc', ['-O2', '-pthread', '-o', program, source], {
        stdio: ['ignore', 'inherit', 'inherit'],
      });
    }
    return program;
  });
}

/** A program of `benchmark/rivals`, built. */
export function rival(name: string): string {
  return once(`rival ${name}`, () =>
    cargo(['build', '--release', '--package', 'rivals', '--bin', name], name),
  );
}

/** What the pager can be built without, to measure what it costs. */
export type Part = 'statistics' | 'recording';

/** A program of the pager's `benches`, built; without a part if told so. */
export function bench(name: string, without?: Part): string {
  return once(`bench ${name} ${without ?? ''}`, () =>
    cargo(['bench', '--package', 'pager', '--bench', name, '--no-run'], name, without),
  );
}

function cargo(words: readonly string[], name: string, without?: Part): string {
  // The other flags would have everything else built again.
  const apart = without === undefined ? [] : ['--target-dir', join(CACHE, `without-${without}`)];
  const env =
    without === undefined
      ? process.env
      : { ...process.env, RUSTFLAGS: `--cfg userfaultfd_without_${without}` };
  const lines = execFileSync('cargo', [...words, ...apart, '--message-format', 'json'], {
    cwd: ROOT,
    encoding: 'utf8',
    env,
    maxBuffer: 1 << 28,
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const built = lines
    .split('\n')
    .filter(line => line.startsWith('{'))
    .map(line => JSON.parse(line) as { target?: { name: string }; executable?: string | null })
    .flatMap(({ target, executable }) => (target?.name === name && executable ? [executable] : []));
  const [executable] = built;
  if (executable === undefined) throw new Error(`cargo has built no executable ${name}`);
  return executable;
}
