/** 1024 bytes. */
export const KiB = 1024;
/** 1024 KiB, in bytes. */
export const MiB: number = 1024 * KiB;
/** 1024 MiB, in bytes. */
export const GiB: number = 1024 * MiB;
