import type { SessionRegion } from './session.js';
import { argumentError, got, validateFd, validateInteger, validateOptions, wrongType } from './validate.js';

/** A stretch of memory that is registered with an adopted userfaultfd. */
export interface AdoptRegion extends SessionRegion {
  /** Where its first byte is in `memfd`: exactly where that is given. A multiple of the page size. */
  readonly memfdOffset?: number;
}

/** @hidden */
export function readRegions(regions: readonly AdoptRegion[]): AdoptRegion[] {
  if (!Array.isArray(regions)) throw wrongType('options.regions', 'an array of regions', regions);
  return regions.map((region: AdoptRegion, index) => readRegion(`options.regions[${index}]`, region));
}

function readRegion(name: string, region: AdoptRegion): AdoptRegion {
  validateOptions(name, region, ['address', 'length', 'sourceOffset', 'memfdOffset']);
  const { address, length, sourceOffset, memfdOffset } = region;
  if (typeof address !== 'bigint') throw wrongType(`${name}.address`, 'a bigint', address);
  if (address < 0n || address >= 1n << 63n) {
    throw argumentError(
      RangeError,
      'ERR_OUT_OF_RANGE',
      `Expected \`${name}.address\` to be an address of user space, ${got(address)}`,
    );
  }
  const checked = {
    address,
    length: validateInteger(`${name}.length`, length, 1, Number.MAX_SAFE_INTEGER),
    sourceOffset: validateInteger(`${name}.sourceOffset`, sourceOffset, 0, Number.MAX_SAFE_INTEGER),
  };
  if (memfdOffset === undefined) return checked;
  const offset = validateInteger(`${name}.memfdOffset`, memfdOffset, 0, Number.MAX_SAFE_INTEGER);
  return { ...checked, memfdOffset: offset };
}

/** @hidden Minor faults need a memfd and know what to do with it; no others do. */
export function refuseMemfd(
  minor: boolean,
  memfd: number | undefined,
  regions: readonly AdoptRegion[],
): void {
  const wrong = (message: string): Error => argumentError(TypeError, 'ERR_INVALID_ARG_VALUE', message);
  if (memfd !== undefined) validateFd('options.memfd', memfd);
  if (minor && memfd === undefined) {
    throw wrong("Expected `options.memfd`: with the mode 'minor', pages are brought by writing to it");
  }
  if (!minor && memfd !== undefined) {
    throw wrong("Expected `options.modes` to have 'minor' with `options.memfd`, which has no use without");
  }
  regions.forEach(({ memfdOffset }, index) => {
    if ((memfdOffset !== undefined) === minor) return;
    const name = `options.regions[${index}].memfdOffset`;
    throw wrong(
      `Expected \`${name}\` ${minor ? '' : 'not '}to be given ${minor ? 'with' : 'without'} \`options.memfd\``,
    );
  });
}
