import type { Welcome } from './connection.js';
import { UffdError } from './errors.js';

/** What came of replacing a daemon on purpose. @hidden */
export interface Upgraded {
  /** The epoch of the daemon that was replaced. */
  from: number;
  /** Why the new executable did not come to serve. */
  failed?: string;
}

/**
 * Whether an upgrade has taken place, as the daemon says that serves now: `false` where the one before ended by itself, and nobody
 * has heard of it. A daemon whose holder does not prove executables knows of none, and is believed.
 *
 * @param from The epoch of the daemon that was asked.
 * @throws {@linkcode UffdError} `ERR_UFFD_PROTOCOL` (the new executable did not come to serve)
 * @hidden
 */
export function hasUpgraded(
  welcome: Welcome | undefined,
  from: number | undefined,
  executable: string,
): boolean {
  const upgrades = welcome?.upgrades;
  if (from === undefined || upgrades === undefined || upgrades === null) return true;
  const upgrade = upgrades.find(one => one.from === from);
  if (upgrade?.failed === undefined) return upgrade !== undefined;
  throw new UffdError(
    'ERR_UFFD_PROTOCOL',
    `${executable} did not take the daemon's place, and what was there before serves again: ${upgrade.failed}`,
    {
      hint: "What it has said is on the standard error of the daemon's holder. It may be of a version that does not go with this daemon's.",
    },
  );
}
