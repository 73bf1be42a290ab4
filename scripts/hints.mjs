// What to do about a command that failed, where its output gives the cause away.

const RUSTUP = 'https://rustup.rs';
const rust = `install Rust 1.88 or newer (${RUSTUP}, or the distribution's \`cargo\` and \`rustc\`) and see that \`cargo\` is on PATH`;

const causes = [
  {
    // napi-cli looks for cargo itself and reports in its own words.
    sign: /cargo metadata failed to run|cargo: (command )?not found|spawn(Sync)? cargo ENOENT|cargo could not be started|`?cargo`? .*command not found/i,
    advice: `no Rust toolchain: ${rust}.`,
  },
  {
    sign: /requires rustc \d|is not supported by the following package|feature `edition2024` is required|rustup could not choose a version/,
    advice: `the Rust toolchain is too old, or none is selected: ${rust} (\`rustup update stable\`).`,
  },
  {
    sign: /linker `\w+` not found|failed to find tool.*\bcc\b/,
    advice: 'no linker: install a C compiler (Debian and Ubuntu: `gcc libc6-dev`, Alpine: `gcc musl-dev`).',
  },
  {
    sign: /no such (sub)?command: `(fmt|clippy)`|'cargo-(fmt|clippy)' is not installed/,
    advice: 'a component of the Rust toolchain is missing: `rustup component add rustfmt clippy`.',
  },
  {
    sign: /EAI_AGAIN|ENOTFOUND|ECONNREFUSED|ETIMEDOUT|Could not resolve host|failed to download|network error/i,
    advice: 'a package registry could not be reached: see to the network (or the proxy) and run it again.',
  },
  {
    sign: /`npm ci` can only install packages when your package\.json and package-lock\.json .* are in sync/,
    advice: 'package.json was changed without its lock file: run `npm install`.',
  },
  {
    sign: /ENOSPC|No space left on device/,
    advice: 'the disk is full: a build needs about 3 GB.',
  },
  { sign: /EACCES|Permission denied/, advice: 'files here belong to another user: see to their owner.' },
];

/**
 * The advice for the first cause that `output` shows, or `undefined`.
 * @param {string} output
 */
export function adviceFor(output) {
  return causes.find(({ sign }) => sign.test(output))?.advice;
}
