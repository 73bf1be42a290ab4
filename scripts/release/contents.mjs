// Which files a tarball has, and which it may not have.

import { binariesOf } from '../build-all/targets.mjs';

const ROOT_NEEDS = [
  'CHANGELOG.md',
  'LICENSE',
  'README.md',
  'dist/index.d.ts',
  'dist/index.js',
  'dist/src/cli/bench/measure.js',
  'dist/src/cli/doctor/attempt.js',
  'dist/src/cli/main.js',
  'dist/src/worker-source-thread.js',
  'index.ts',
  'native.cjs',
  'native.d.cts',
  'package.json',
];
/** `src` is what the declaration maps point into; nobody imports the command line, which has none. */
const ROOT_MAY =
  /^(?:dist\/.*\.(?:js|d\.ts|d\.ts\.map)|src\/.*\.ts|index\.ts|native\.cjs|native\.d\.cts|[A-Z]+(?:\.md)?|package\.json)$/;

/**
 * What is wrong with the files of a tarball; empty where nothing is.
 * @param {import('./stage.mjs').Tarball} tarball
 */
export function contentsOf({ name, files }) {
  const platform = /^@userfaultfd\/binding-(.*)$/.exec(name)?.[1];
  if (platform === undefined) {
    return [
      ...ROOT_NEEDS.filter(file => !files.includes(file)).map(file => `${file} is missing`),
      ...files.filter(file => !ROOT_MAY.test(file)).map(file => `${file} does not belong there`),
    ].join('\n');
  }
  const papers = ['LICENSE', 'README.md', 'THIRD-PARTY-LICENSES', 'package.json'];
  const expected = [...papers, ...binariesOf(platform)].toSorted();
  const same = files.toSorted().join() === expected.join();
  return same ? '' : `${files.join(', ')} instead of ${expected.join(', ')}`;
}
