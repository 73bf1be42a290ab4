import type { NativeDirty, NativePolicy, NativePopulated, NativePopulateOptions } from '#native';

import type { Rest } from './policy.js';
import { isOfThisUser, RemoteRecordings, type ToldRecording } from './remote-recordings.js';
import { answered, dirtyOf, pairsOf, type Told } from './remote-told.js';

/** What is asked of a daemon about its sessions. @hidden */
export abstract class RemoteRequests {
  readonly recordings: RemoteRecordings = new RemoteRecordings(async (...asked) => this.repeated(...asked));

  /** Asks; a request that can be repeated is, on the next connection. */
  abstract request(method: string, params: object, fds?: readonly number[], owned?: boolean): Promise<Told>;
  abstract tell(method: string, params: object, fds?: readonly number[]): void;
  /** A request that means the same when it is made twice. */
  abstract repeated(method: string, params: object): Promise<Told>;

  closeSession(session: number, rest: Rest): void {
    this.repeated('session.close', { session, rest }).catch(() => {});
  }

  async populate(session: number, options: NativePopulateOptions): Promise<NativePopulated> {
    const { request, ranges, rate } = options;
    return answered(this.repeated('session.populate', { session, request, ranges: pairsOf(ranges), rate }));
  }

  cancelPopulate(session: number, request: number): void {
    this.tell('session.cancelPopulate', { session, request });
  }

  async detach(session: number): Promise<NativePopulated> {
    return answered(this.request('session.detach', { session }));
  }

  async takeDirty(session: number, most: number): Promise<NativeDirty> {
    const { error, ...told } = await answered(this.request('session.takeDirty', { session, most }));
    return error ? { error, ranges: [], more: false } : dirtyOf(told);
  }

  async hold(session: number): Promise<NativePopulated> {
    return answered(this.repeated('session.hold', { session }));
  }

  async resume(session: number, source?: number): Promise<NativePopulated> {
    return answered(this.repeated('session.resume', { session, source }));
  }

  decide(session: number, policy: NativePolicy): void {
    this.repeated('session.decide', { session, policy }).catch(() => {});
  }

  async stopRecording(session: number): Promise<NativePopulated> {
    const { error, recording } = await answered(this.repeated('session.stopRecording', { session }));
    // Whoever asks for its end writes it, too: that is the same file.
    if (recording) void this.recordings.bring(recording as ToldRecording);
    return (await this.recordings.outcome(session)) ?? (error ? { error } : {});
  }

  async replayed(session: number): Promise<NativePopulated> {
    return answered(this.repeated('session.replayed', { session }));
  }

  /** Recordings of a server whose program is gone. */
  async bringOf(server: number): Promise<void> {
    const told = await this.recordings.list();
    const its = told.filter(
      recording => recording.server === server && !recording.lost && isOfThisUser(recording),
    );
    await Promise.all(its.map(async recording => this.recordings.bring(recording)));
  }
}
