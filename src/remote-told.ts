// What a daemon tells, and the shapes in which the addon gives the same things.

import type { NativeDirty, NativeError, NativeSession, NativeStats } from '#native';

import { toNative, UffdError } from './errors.js';

/** As it comes. */
export type Told = Record<string, unknown>;

/** Why a session is over that its daemon does not know. */
export const GONE: NativeError = {
  code: 'ERR_UFFD_PAGER_LOST',
  message: 'the daemon that served it ended, and the one that is there now does not know it',
};

/** The daemon is older than what it was asked. */
export function isUnknownMethod(error: unknown): boolean {
  return (error as UffdError).code === 'ERR_UFFD_PROTOCOL' && /\(-32601\)/.test((error as UffdError).message);
}

/** What a daemon cannot do that does not know of it. */
export function tooOld(path: string): UffdError {
  return new UffdError(
    'ERR_UFFD_UNSUPPORTED',
    `the daemon at ${path} is older than this package, and neither records nor replays`,
    { hint: 'Replace it: `client.upgrade()`.' },
  );
}

export function lostNotice(id: number, error: NativeError): Told {
  return { kind: 'ended', at: Date.now(), id, reason: 'pager-lost', error };
}

/** What a request comes to, as the addon says it. */
export async function answered(request: Promise<Told>): Promise<Told & { error?: NativeError }> {
  try {
    return await request;
  } catch (thrown) {
    if (!(thrown instanceof UffdError)) throw thrown;
    return { error: toNative(thrown) };
  }
}

/** Address and bytes of each range. */
export function pairsOf(
  ranges: readonly number[] | undefined,
): (string | number | undefined)[][] | undefined {
  return ranges?.flatMap((start, at) =>
    at % 2 === 0 ? [[`0x${BigInt(start).toString(16)}`, ranges[at + 1]]] : [],
  );
}

export function dirtyOf(told: Told): NativeDirty {
  const { ranges, more } = told as unknown as { ranges: Told[]; more: boolean };
  return { ranges: ranges.map(range => withAddress(range) as unknown as NativeDirty['ranges'][0]), more };
}

export function withAddress(told: Told): Told & { address: bigint } {
  return { ...told, address: BigInt(told['address'] as string) };
}

export function sessionOf(told: Told): NativeSession {
  const regions = (told['regions'] as Told[]).map(withAddress);
  return { ...told, regions } as unknown as NativeSession;
}

export function statsOf(told: Told): NativeStats {
  return { ...told, latencies: Float64Array.from(told['latencies'] as number[]) } as unknown as NativeStats;
}
