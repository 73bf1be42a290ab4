// How large a package may be.

const LARGEST_ROOT = 300_000;
/** Bytes of a binary. */
export const LARGEST_BINARY = 2_000_000;

const kB = bytes => `${(bytes / 1000).toFixed(0)} kB`;

/**
 * Compares tarballs with what is promised: the root's tarball, each file of the platform packages.
 *
 * @param {import('./stage.mjs').Tarball[]} tarballs
 * @param {(what: string, problem: string, detail: string) => void} check Told about each.
 */
export function checkSizes(tarballs, check) {
  for (const { name, size, unpackedSize, largest, files } of tarballs) {
    const isRoot = !files.some(file => file.endsWith('.node'));
    const [bytes, most] = isRoot ? [size, LARGEST_ROOT] : [largest, LARGEST_BINARY];
    const problem = bytes < most ? '' : `${kB(bytes)}, and less than ${kB(most)} is promised`;
    check(`size of ${name}`, problem, `tarball ${kB(size)}, installed ${kB(unpackedSize)}`);
  }
}
