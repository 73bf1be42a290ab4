//! Trying again what may succeed a little later.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{PageSource, ReadNow, waiting};
use crate::error::PagerError;

/// How often, and for how long, a read is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryOptions {
    /// Attempts in all, the first included; at least 1. Default: 5.
    pub attempts: u32,
    /// The pause before the second attempt; each later one is twice as long. Each is shortened by up to a half at random,
    /// so that many readers do not come back together. Default: 10 ms.
    pub first_pause: Duration,
    /// The longest pause. Default: 1 s.
    pub longest_pause: Duration,
    /// When to give up, counted from the beginning of the first attempt. An attempt that is under way is not interrupted.
    /// Default: 10 s.
    pub deadline: Duration,
}

impl Default for RetryOptions {
    fn default() -> Self {
        Self {
            attempts: 5,
            first_pause: Duration::from_millis(10),
            longest_pause: Duration::from_secs(1),
            deadline: Duration::from_secs(10),
        }
    }
}

/// Reads another source, again where it fails in a way that passes: EIO, EINTR, ETIMEDOUT, EAGAIN
/// ([`PagerError::is_transient`]). Any other error is final.
///
/// The pauses are spent on workers: the event loop gives a read that failed to one of them.
#[derive(Debug)]
pub struct RetrySource {
    inner: Arc<dyn PageSource>,
    options: RetryOptions,
}

impl RetrySource {
    /// `inner`, read as the options say.
    ///
    /// # Errors
    ///
    /// [`PagerError::SourceOption`] when there would be no attempt at all.
    pub fn new(inner: Arc<dyn PageSource>, options: RetryOptions) -> Result<Self, PagerError> {
        if options.attempts == 0 {
            return Err(PagerError::SourceOption {
                option: "attempts",
                value: 0,
                reason: "the first attempt counts: give at least 1",
            });
        }
        Ok(Self { inner, options })
    }

    /// How long to wait after `attempts` failed ones.
    fn pause(&self, attempts: u32) -> Duration {
        let RetryOptions { first_pause, longest_pause, .. } = self.options;
        let doublings = attempts.saturating_sub(1).min(30);
        let pause = first_pause.saturating_mul(1 << doublings).min(longest_pause);
        // Of 65536 parts, up to a half is taken off.
        let off = RandomState::new().build_hasher().finish() as u32 & 0x7fff;
        pause - pause.mul_f64(f64::from(off) / 65536.0)
    }
}

impl PageSource for RetrySource {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
        match self.inner.read_now(offset, buffer) {
            Err(error) if error.is_transient() => Ok(ReadNow::WouldBlock),
            result => result,
        }
    }

    fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
        self.inner.bytes(offset, len)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
        let started = Instant::now();
        let mut attempts = 0;
        loop {
            attempts += 1;
            let cause = match waiting::read(&self.inner, offset, buffer) {
                Err(cause) if cause.is_transient() => cause,
                result => return result,
            };
            let passed = started.elapsed();
            let left = self.options.deadline.saturating_sub(passed);
            if attempts >= self.options.attempts || left.is_zero() {
                let ms = passed.as_millis() as u64;
                return Err(PagerError::GaveUp { attempts, ms, cause: Box::new(cause) });
            }
            thread::sleep(self.pause(attempts).min(left));
        }
    }

    fn answered_by(&self) -> Option<u32> {
        self.inner.answered_by()
    }

    fn put_right(&self) {
        self.inner.put_right();
    }

    fn zeros(&self, offset: u64, len: u64) -> bool {
        self.inner.zeros(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use nix::errno::Errno;

    use super::*;

    /// Fails so many times with an errno, then gives sevens.
    #[derive(Debug)]
    struct Flaky {
        failures: AtomicU32,
        errno: Errno,
    }

    impl Flaky {
        fn new(failures: u32, errno: Errno) -> Arc<Self> {
            Arc::new(Self { failures: AtomicU32::new(failures), errno })
        }
    }

    impl PageSource for Flaky {
        fn size(&self) -> u64 {
            4096
        }
        fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Result<ReadNow, PagerError> {
            self.read(offset, buffer).map(|()| ReadNow::Done)
        }
        fn read(&self, _: u64, buffer: &mut [u8]) -> Result<(), PagerError> {
            let fails = |left: u32| left.checked_sub(1);
            if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fails).is_ok() {
                return Err(PagerError::Source { path: "flaky".into(), syscall: "pread", errno: self.errno });
            }
            buffer.fill(7);
            Ok(())
        }
    }

    fn quick(attempts: u32) -> RetryOptions {
        RetryOptions { attempts, first_pause: Duration::from_micros(10), ..RetryOptions::default() }
    }

    #[test]
    fn what_passes_is_tried_again_on_workers_and_never_on_the_event_loop() {
        for errno in [Errno::EIO, Errno::EINTR, Errno::ETIMEDOUT, Errno::EAGAIN] {
            let source = RetrySource::new(Flaky::new(3, errno), quick(3)).unwrap();
            let mut buffer = [0; 16];

            assert_eq!(source.read_now(0, &mut buffer).unwrap(), ReadNow::WouldBlock);
            source.read(0, &mut buffer).unwrap();

            assert_eq!(buffer, [7; 16]);
        }
    }

    #[test]
    fn after_the_last_attempt_the_error_tells_how_many_and_the_last_cause() {
        let source = RetrySource::new(Flaky::new(9, Errno::EIO), quick(4)).unwrap();

        let error = source.read(0, &mut [0; 16]).unwrap_err();

        assert!(matches!(error, PagerError::GaveUp { attempts: 4, .. }), "{error}");
        assert_eq!((error.code(), error.errno()), ("ERR_UFFD_SOURCE", Some(libc::EIO)));
        assert!(error.to_string().contains("flaky"), "{error}");
    }

    #[test]
    fn after_the_deadline_nothing_is_tried_again() {
        let options = RetryOptions { deadline: Duration::from_millis(30), ..quick(u32::MAX) };
        let source = RetrySource::new(Flaky::new(u32::MAX, Errno::ETIMEDOUT), options).unwrap();
        let started = Instant::now();

        let error = source.read(0, &mut [0; 16]).unwrap_err();

        let PagerError::GaveUp { attempts, ms, .. } = error else { panic!("{error}") };
        assert!(attempts > 1 && ms >= 30, "{attempts} attempts, {ms} ms");
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn an_error_that_does_not_pass_is_final() {
        let flaky = Flaky::new(2, Errno::EACCES);
        let source = RetrySource::new(Arc::<Flaky>::clone(&flaky), quick(9)).unwrap();

        assert!(matches!(source.read(0, &mut [0]), Err(PagerError::Source { errno: Errno::EACCES, .. })));
        assert!(matches!(source.read_now(0, &mut [0]), Err(PagerError::Source { errno: Errno::EACCES, .. })));
        assert_eq!(flaky.failures.load(Ordering::SeqCst), 0, "one attempt each");
    }

    #[test]
    fn pauses_double_up_to_the_longest_less_at_most_a_half() {
        let source = RetrySource::new(Flaky::new(0, Errno::EIO), RetryOptions::default()).unwrap();
        for (attempts, ms) in [(1, 10), (2, 20), (3, 40), (7, 640), (8, 1000), (u32::MAX, 1000)] {
            let full = Duration::from_millis(ms);
            for _ in 0..20 {
                let pause = source.pause(attempts);
                assert!(pause <= full && pause >= full / 2, "{attempts}: {pause:?}");
            }
        }
        assert!(RetrySource::new(Flaky::new(0, Errno::EIO), quick(0)).is_err());
    }
}
