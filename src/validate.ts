import { fileURLToPath } from 'node:url';
import { inspect } from 'node:util';

/** Node's own argument errors, so that callers match on codes they know. */
export function argumentError(
  Type: typeof TypeError | typeof RangeError,
  code: 'ERR_INVALID_ARG_TYPE' | 'ERR_INVALID_ARG_VALUE' | 'ERR_OUT_OF_RANGE',
  message: string,
): Error {
  return Object.assign(new Type(message), { code });
}

/** The end of a message: what it was instead. */
export function got(value: unknown): string {
  return `got ${inspect(value, { depth: 0, maxStringLength: 60 })}`;
}

/** The error for an argument of another type; `what` with its article. */
export function wrongType(name: string, what: string, value: unknown): Error {
  return argumentError(
    TypeError,
    'ERR_INVALID_ARG_TYPE',
    `Expected \`${name}\` to be ${what}, ${got(value)}`,
  );
}

/** Refuses anything but an object whose keys are all known: a misspelt option would silently do nothing. */
export function validateOptions(name: string, value: unknown, known: readonly string[]): void {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw wrongType(name, 'an object', value);
  }
  // No array is made of them: this stands in front of calls of the inner loop.
  for (const key in value) {
    if (!known.includes(key) && Object.hasOwn(value, key)) {
      const options = known.map(option => `\`${option}\``).join(', ');
      throw argumentError(
        TypeError,
        'ERR_INVALID_ARG_VALUE',
        `Unknown option \`${key}\` in \`${name}\`; known are ${options}`,
      );
    }
  }
}

/** A string with at least one character and no NUL. */
export function validatePath(name: string, value: unknown): string {
  if (typeof value !== 'string') {
    throw wrongType(name, 'a path (a string)', value);
  }
  if (value === '' || value.includes('\0')) {
    throw argumentError(
      TypeError,
      'ERR_INVALID_ARG_VALUE',
      `Expected \`${name}\` to be a path without NUL characters, ${got(value)}`,
    );
  }
  return value;
}

/** A path, or a `file:` URL of one. */
export function validatePathOrUrl(name: string, value: unknown): string {
  return validatePath(name, value instanceof URL ? fileURLToPath(value) : value);
}

/** The number of a descriptor. */
export function validateFd(name: string, value: unknown): number {
  return validateInteger(name, value, 0, 2 ** 31 - 1);
}

/** A number between two bounds, both included. */
export function validateNumber(name: string, value: unknown, least: number, most: number): number {
  if (typeof value !== 'number') {
    throw wrongType(name, 'a number', value);
  }
  if (!(value >= least && value <= most)) {
    throw argumentError(
      RangeError,
      'ERR_OUT_OF_RANGE',
      `Expected \`${name}\` to be a number from ${least} to ${most}, ${got(value)}`,
    );
  }
  return value;
}

/** An integer between two bounds, both included. */
export function validateInteger(name: string, value: unknown, least: number, most: number): number {
  if (typeof value !== 'number') {
    throw wrongType(name, 'a number', value);
  }
  if (!Number.isInteger(value) || value < least || value > most) {
    throw argumentError(
      RangeError,
      'ERR_OUT_OF_RANGE',
      `Expected \`${name}\` to be an integer from ${least} to ${most}, ${got(value)}`,
    );
  }
  return value;
}

/** One of a few strings. */
export function validateOneOf<T extends string>(name: string, value: unknown, choices: readonly T[]): T {
  if (!choices.includes(value as T)) {
    const list = choices.map(choice => `'${choice}'`).join(', ');
    throw argumentError(
      TypeError,
      'ERR_INVALID_ARG_VALUE',
      `Expected \`${name}\` to be one of ${list}, ${got(value)}`,
    );
  }
  return value as T;
}

/** A power of two between two bounds, both included. */
export function validatePowerOfTwo(name: string, value: unknown, least: number, most: number): number {
  const number = validateInteger(name, value, least, most);
  if ((number & (number - 1)) !== 0) {
    throw argumentError(
      RangeError,
      'ERR_OUT_OF_RANGE',
      `Expected \`${name}\` to be a power of two, ${got(value)}`,
    );
  }
  return number;
}

/** `true` or `false`; `fallback` where it was left out. */
export function validateBoolean(name: string, value: unknown, fallback: boolean): boolean {
  if (value === undefined) return fallback;
  if (typeof value !== 'boolean') {
    throw wrongType(name, 'true or false', value);
  }
  return value;
}

/** A list of some of a few strings. */
export function validateNames<T extends string>(name: string, value: unknown, choices: readonly T[]): T[] {
  if (value === undefined) return [];
  if (!Array.isArray(value)) {
    throw wrongType(name, 'an array of names', value);
  }
  return value.map((one: unknown, index) => validateOneOf(`${name}[${index}]`, one, choices));
}

/** The bytes of any view, without a copy. */
export function validateView(name: string, value: unknown): Uint8Array {
  if (value instanceof Uint8Array) return value;
  if (ArrayBuffer.isView(value)) return new Uint8Array(value.buffer, value.byteOffset, value.byteLength);
  throw wrongType(name, 'an ArrayBufferView', value);
}

/** A part of something that has `total` bytes, in whole units; `length` is the other argument's name. */
export function validatePart(
  name: string,
  offset: number,
  length: number,
  unit: number,
  total: number,
): void {
  const least = unit > 1 ? unit : 0;
  validateInteger(name, offset, 0, total - least);
  validateInteger('length', length, least, total - offset);
  for (const [part, value] of [
    [name, offset],
    ['length', length],
  ] as const) {
    if (value % unit !== 0) {
      throw Object.assign(
        new RangeError(`Expected \`${part}\` to be a multiple of the page size, ${unit}, got ${value}`),
        { code: 'ERR_OUT_OF_RANGE' },
      );
    }
  }
}
