/** What everybody's memory is made of: a few regions whose bytes lie far apart, every page a word of its own, none zero. */

import { KiB } from 'userfaultfd';

export const PAGE: number = 4 * KiB;
/** Each in another piece of the image: a source in JavaScript is asked for such pieces. */
export const REGIONS = 6;
export const REGION_PAGES = 4;
export const PAGES: number = REGIONS * REGION_PAGES;
export const APART: number = 256 * KiB;

/** What is read from a page that was discarded. */
export const ZERO = '0'.repeat(16);

/** Which region has a page. */
export const regionOf = (page: number): number => Math.floor(page / REGION_PAGES);

/** The word of 8 bytes that a page consists of, in hexadecimal. */
export function wordOf(page: number): string {
  return Buffer.from([0xa5, page + 1, 0xff - page, 0x3c, (page * 7 + 1) % 256, 0x77, 0x10, 0x01]).toString(
    'hex',
  );
}

/** All of it. */
export function imageBytes(): Buffer {
  const bytes = Buffer.alloc(REGIONS * APART, 0xee);
  for (let page = 0; page < PAGES; page += 1) {
    const at = regionOf(page) * APART + (page % REGION_PAGES) * PAGE;
    bytes.fill(Buffer.from(wordOf(page), 'hex'), at, at + PAGE);
  }
  return bytes;
}
