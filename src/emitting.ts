/** @hidden Emits: a listener that throws is told like any uncaught error, and does not swallow the notices behind it. */
export function emitting(emit: () => void): void {
  try {
    emit();
  } catch (error) {
    queueMicrotask(() => {
      throw error;
    });
  }
}
