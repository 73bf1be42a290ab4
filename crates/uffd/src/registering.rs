//! Registering memory and giving it back.

use std::sync::PoisonError;

use nix::errno::Errno;
use userfaultfd_sys as sys;

use crate::error::{Operation, UffdError};
use crate::features::{Ioctls, Modes};
use crate::fill::retried;
use crate::ioctl;
use crate::page::page_size;
use crate::userfaultfd::Userfaultfd;

impl Userfaultfd {
    /// `UFFDIO_REGISTER`: from now on touching the range waits for whoever serves it, in these modes and those it was
    /// registered for through this object before: modes are added, never lost. Returns the ioctls the range can take.
    ///
    /// Parts of the range that nothing is mapped at are passed over, unless that is all of it.
    ///
    /// # Safety
    ///
    /// If the memory is this process's own: no Rust reference to it is used while a page of it may be missing,
    /// unless another thread answers its faults.
    ///
    /// # Errors
    ///
    /// EINVAL for no modes, unaligned ranges, memory that cannot be registered (files, System V shared memory) or not
    /// so; EPERM for shared memory without write permission; EBUSY for memory of another userfaultfd;
    /// [`UffdError::UffdClosed`] when the process is gone. What was registered before stays as it was.
    pub unsafe fn register(&self, start: u64, len: u64, modes: Modes) -> Result<Ioctls, UffdError> {
        // SAFETY: the same promise.
        unsafe { self.register_requiring(start, len, modes, Ioctls::empty()) }
    }

    /// [`Userfaultfd::register`], undone where the range turns out not to take `require`.
    ///
    /// # Safety
    ///
    /// As for [`Userfaultfd::register`].
    ///
    /// # Errors
    ///
    /// As for [`Userfaultfd::register`], and [`UffdError::MissingIoctls`].
    pub unsafe fn register_requiring(
        &self,
        start: u64,
        len: u64,
        modes: Modes,
        require: Ioctls,
    ) -> Result<Ioctls, UffdError> {
        let failed = |errno| UffdError::System { operation: Operation::Register, errno };
        let end = start
            .checked_add(len)
            .filter(|&end| end > start && !modes.is_empty())
            .ok_or(failed(Errno::EINVAL))?;
        // Only whole values are put in under this lock.
        let mut registrations = self.registrations().lock().unwrap_or_else(PoisonError::into_inner);
        let pieces = registrations.pieces(start, end);
        let mut ioctls = Ioctls::all();
        // Pieces that come out alike are one call: the kernel passes over holes inside a call, not over a call that is
        // all hole.
        for wanted in pieces.chunk_by(|a, b| a.modes | modes == b.modes | modes) {
            let (Some(first), Some(last)) = (wanted.first(), wanted.last()) else { continue };
            match self.register_piece(first.start, last.end, first.modes | modes) {
                Ok(granted) => ioctls &= granted,
                Err(errno) => {
                    for done in pieces.iter().filter(|done| done.end <= first.start) {
                        self.put_back(done.start, done.end, done.modes);
                    }
                    return Err(self.classify(Operation::Register, errno));
                }
            }
        }
        let missing = require.difference(ioctls);
        if !missing.is_empty() {
            for piece in &pieces {
                self.put_back(piece.start, piece.end, piece.modes);
            }
            return Err(UffdError::MissingIoctls { missing });
        }
        for piece in pieces {
            registrations.set(piece.start, piece.end, piece.modes | modes);
        }
        Ok(ioctls)
    }

    /// `UFFDIO_UNREGISTER`, followed by `UFFDIO_WAKE` of the same range: the kernel itself does not wake the waiters of
    /// ranges registered only for write-protect or minor faults. Pages still missing read zero from now on.
    ///
    /// # Errors
    ///
    /// [`UffdError::UffdClosed`] when the process is gone; else EINVAL, or ENOMEM where splitting mappings hits a limit.
    pub fn unregister(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut arg = sys::uffdio_range { start, len };
        // SAFETY: `arg` lives across the call and has the size that the number encodes.
        let result = retried(|| unsafe { ioctl::unregister(self.raw(), &raw mut arg) });
        result.map_err(|errno| self.classify(Operation::Unregister, errno))?;
        let mut registrations = self.registrations().lock().unwrap_or_else(PoisonError::into_inner);
        registrations.set(start, start.saturating_add(len), Modes::empty());
        drop(registrations);
        self.wake(start, len)
    }

    /// [`Userfaultfd::unregister`] of everything that is registered through this object. Ranges that are not mapped any
    /// more are only forgotten.
    ///
    /// # Errors
    ///
    /// As [`Userfaultfd::unregister`], of the first range that is refused.
    pub fn unregister_all(&self) -> Result<(), UffdError> {
        let ranges = self.registrations().lock().unwrap_or_else(PoisonError::into_inner).all();
        for (start, end) in ranges {
            match self.unregister(start, end - start) {
                Err(UffdError::System { errno: Errno::EINVAL, .. }) => {
                    let mut registrations =
                        self.registrations().lock().unwrap_or_else(PoisonError::into_inner);
                    registrations.set(start, end, Modes::empty());
                }
                result => result?,
            }
        }
        Ok(())
    }

    /// Takes what is registered over from the userfaultfd whose process forked: the kernel has registered the child's
    /// memory in the same way.
    pub fn inherit(&self, parent: &Self) {
        let inherited = parent.registrations().lock().unwrap_or_else(PoisonError::into_inner).clone();
        *self.registrations().lock().unwrap_or_else(PoisonError::into_inner) = inherited;
    }

    /// Whether anything is registered through this object.
    #[must_use]
    pub fn has_registrations(&self) -> bool {
        !self.registrations().lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Poisons what is missing of all that is registered for missing faults: who waits for it, or touches it later, gets
    /// SIGBUS instead of the zeros that closing would give.
    ///
    /// # Errors
    ///
    /// Where POISON is refused; EINVAL before Linux 6.6. What was poisoned stays so.
    pub fn poison_missing(&self) -> Result<(), UffdError> {
        let segments = self.registrations().lock().unwrap_or_else(PoisonError::into_inner).missing();
        segments.into_iter().try_for_each(|(start, end)| self.poison_segment(start, end))
    }

    fn poison_segment(&self, start: u64, end: u64) -> Result<(), UffdError> {
        let mut page = page_size() as u64;
        let mut at = start;
        while at < end {
            match self.poison(at, end - at, true) {
                Ok(()) | Err(UffdError::UffdClosed) => return Ok(()),
                Err(UffdError::PartiallyCopied { done }) => at += done,
                // Present, or nothing is mapped there any more: nobody waits for it.
                Err(UffdError::PageExist | UffdError::NotRegistered) => at += page,
                // A step into a huge page: the memory is made of larger ones.
                Err(UffdError::System { errno: Errno::EINVAL, .. }) if at > start && page < 1 << 30 => {
                    at = at - page + page * 512;
                    page *= 512;
                }
                Err(UffdError::Changing) => std::thread::yield_now(),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn register_piece(&self, start: u64, end: u64, modes: Modes) -> Result<Ioctls, Errno> {
        let range = sys::uffdio_range { start, len: end - start };
        let mut arg = sys::uffdio_register { range, mode: modes.bits(), ioctls: 0 };
        // SAFETY: `arg` lives across the call and has the size that the number encodes. What registering means for
        // memory is the promise of the caller of `register`.
        retried(|| unsafe { ioctl::register(self.raw(), &raw mut arg) })?;
        Ok(Ioctls::from_bits_retain(arg.ioctls))
    }

    /// Makes a piece what it was before a registration that failed further on.
    fn put_back(&self, start: u64, end: u64, modes: Modes) {
        let range = sys::uffdio_range { start, len: end - start };
        let mut arg = range;
        // SAFETY: `arg` lives across the call and has the size that the number encodes. The piece was registered a
        // moment ago, so this undoes no more than that.
        let _ = retried(|| unsafe { ioctl::unregister(self.raw(), &raw mut arg) });
        if !modes.is_empty() {
            let _ = self.register_piece(start, end, modes);
        }
        let _ = self.wake(range.start, range.len);
    }

    /// ENOMEM is ambiguous: a process that is gone, or the limit of mappings.
    fn classify(&self, operation: Operation, errno: Errno) -> UffdError {
        match errno {
            Errno::ENOMEM if self.is_dead() => UffdError::UffdClosed,
            errno => UffdError::System { operation, errno },
        }
    }
}
