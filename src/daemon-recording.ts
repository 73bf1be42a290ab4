import { UffdError } from './errors.js';
import { holdOpen } from './hold-open.js';
import { isOfThisUser, type RemoteRecordings, type ToldRecording } from './remote-recordings.js';
import { validatePathOrUrl } from './validate.js';

/**
 * A recording that a daemon has made in its memory, and that is in no file yet, whoever had it made ({@link PagerClient.recordings}): the
 * program for which it was is gone, or could not write it.
 */
export class DaemonRecording {
  readonly #recordings: RemoteRecordings;
  readonly #told: ToldRecording;
  /** The session whose faults it has. */
  readonly session: number;
  /** The file that was asked for, as that program sees it. */
  readonly path: string;
  /** The user whose program that was. */
  readonly uid: number | undefined;
  /** Bytes; 0 where it is lost. */
  readonly size: number;
  /** Nothing is missing at its end; it ends where the daemon that wrote it ended; it had to make room for others. */
  readonly state: 'whole' | 'torn' | 'lost';
  /** Whether the client for which it was made is connected, which writes it by itself. */
  readonly attended: boolean;

  /** @hidden */
  constructor(recordings: RemoteRecordings, told: ToldRecording) {
    this.#recordings = recordings;
    this.#told = told;
    this.session = told.session;
    this.path = told.path;
    this.uid = told.uid ?? undefined;
    this.size = told.size ?? 0;
    this.state = told.lost ? 'lost' : told.whole ? 'whole' : 'torn';
    this.attended = told.attended;
  }

  /**
   * Writes it to a file; the daemon lets go of it then. What was there before stays until all of it is written. One that was written
   * meanwhile, by whomever, is not written again.
   *
   * @param path Another file than the one that was asked for; has to be said where another user's program has done that.
   * @throws {@linkcode UffdError} `ERR_UFFD_TRACE` (it cannot be written, and stays; it is lost), `ERR_UFFD_TIMEOUT`
   *   (the disk has taken more than 5 seconds; it stays), `ERR_UFFD_PEER_NOT_ALLOWED` (another user has
   *   named its file), `ERR_UFFD_PAGER_LOST`
   */
  async write(path?: string | URL): Promise<void> {
    const to = path === undefined ? this.path : validatePathOrUrl('path', path);
    if (path === undefined && !isOfThisUser(this.#told)) {
      throw new UffdError(
        'ERR_UFFD_PEER_NOT_ALLOWED',
        `user ${this.uid} has asked for the recording to be written to ${this.path}`,
        { hint: 'Give a path of your own.' },
      );
    }
    if (this.state === 'lost') {
      throw new UffdError(
        'ERR_UFFD_TRACE',
        `the recording of session ${this.session} had to make room for others`,
      );
    }
    await holdOpen(this.#recordings.write(this.#told, to));
  }
}
