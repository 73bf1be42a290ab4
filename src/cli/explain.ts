import { UffdError } from '../errors.js';

/** An error as a person needs it at a prompt: what it was, and what to do. Anything unexpected with its stack. */
export function explain(error: unknown): string {
  if (error instanceof UffdError) {
    return `${error.code}: ${error.message}${error.hint === undefined ? '' : `\n${error.hint}`}`;
  }
  if (error instanceof Error && 'code' in error) return `${String(error.code)}: ${error.message}`;
  return error instanceof Error ? (error.stack ?? error.message) : String(error);
}
