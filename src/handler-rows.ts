// The rows in which deliveries cross from the addon, all hidden from users.

/** Rows of one delivery at most. */
export const BATCH = 256;
/** Words of one. Of a fault: its flags, its name, its address, the thread. */
export const ROW = 4;

/** From here on a row is no fault to answer; then it is, in its first word, one of those below. */
export const OTHERS = 64;
export const FORKED = 64;
export const REMAPPED = 65;
export const REMOVED = 66;
export const UNMAPPED = 67;
export const UNKNOWN = 68;
export const STALE = 69;
export const EXPIRED = 70;
export const SELF_FAULT = 71;
