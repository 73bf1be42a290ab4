// On another platform, or without the binary: the import works, the first use says what is wrong and what to do.
const platform = process.argv[2];
if (platform) Object.defineProperty(process, 'platform', { value: platform });
const { capabilities, KiB, UffdError } = await import('userfaultfd');
if (KiB !== 1024) throw new Error('the import does not work');
try {
  capabilities();
} catch (error) {
  if (!(error instanceof UffdError)) throw error;
  console.log(JSON.stringify({ code: error.code, message: error.message, hint: error.hint }));
}
