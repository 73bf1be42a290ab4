// What a daemon tells, and the shapes in which the addon gives the same things.

import type { NativeError, NativeSession, NativeStats } from '#native';

import { toNative, UffdError } from './errors.js';

/** As it comes. */
export type Told = Record<string, unknown>;

/** What cannot be asked of a session of a daemon. */
export const NOT_RECORDED: NativeError = {
  code: 'ERR_UFFD_UNSUPPORTED',
  message: 'sessions of a daemon are neither recorded nor replayed',
};

/** Why a session is over that its daemon does not know. */
export const GONE: NativeError = {
  code: 'ERR_UFFD_PAGER_LOST',
  message: 'the daemon that served it ended, and the one that is there now does not know it',
};

/** The daemon is older than what it was asked. */
export function isUnknownMethod(error: unknown): boolean {
  return (error as UffdError).code === 'ERR_UFFD_PROTOCOL' && /\(-32601\)/.test((error as UffdError).message);
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
