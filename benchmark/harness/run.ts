/** One run of one contender: where it runs, and what it is given. */

import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { output } from './child.js';
import { type Image, image } from './image.js';
import type { Cpus } from './placement.js';
import { floor } from './tools.js';

/** What a contender is handed. */
export class Run {
  readonly cpus: Cpus;
  /** Less of everything. */
  readonly quick: boolean;

  constructor(cpus: Cpus, quick: boolean) {
    this.cpus = cpus;
    this.quick = quick;
  }

  /**
   * Touches and frees memory on the CPU that will copy. What the host of a virtual machine has taken away costs ten times as
   * much at its first touch, and what another CPU has freed lies with that one. With `huge`, in transparent huge pages as well.
   */
  async warm(bytes: number, huge = false): Promise<void> {
    const warm = [floor('warm'), `${bytes}`];
    await output(this.cpus.handler, warm);
    if (huge) await output(this.cpus.handler, [...warm, 'huge']);
  }

  /** An image of real bytes. */
  image(bytes: number): Image {
    return image(bytes);
  }

  /** Calls `use` with a new directory, which is gone afterwards. */
  async inFolder<T>(use: (folder: string) => Promise<T>): Promise<T> {
    const folder = mkdtempSync(join(tmpdir(), 'userfaultfd-'));
    try {
      return await use(folder);
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  }
}
