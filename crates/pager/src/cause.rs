//! What is behind an error, link by link, down to what the kernel has answered.

use std::error::Error;

use nix::errno::Errno;
use uffd::{AdoptError, UffdError};

use crate::error::PagerError;

/// One link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// A code of this package, or the name of an errno.
    pub code: String,
    /// What it says.
    pub message: String,
    /// The errno behind it.
    pub errno: Option<i32>,
    /// The system call or ioctl behind it.
    pub syscall: Option<String>,
}

/// The public code of what a userfaultfd operation has failed with.
#[must_use]
pub const fn code_of(error: &UffdError) -> &'static str {
    match error {
        UffdError::PageExist => "ERR_UFFD_PAGE_EXIST",
        UffdError::UffdClosed => "ERR_UFFD_CLOSED",
        UffdError::PartiallyCopied { .. } => "ERR_UFFD_PARTIALLY_COPIED",
        UffdError::Changing => "ERR_UFFD_CHANGING",
        UffdError::NotRegistered => "ERR_UFFD_NOT_REGISTERED",
        UffdError::MissingIoctls { .. } => "ERR_UFFD_UNSUPPORTED",
        UffdError::EndOfFile | UffdError::ShortRead { .. } => "ERR_UFFD_PROTOCOL",
        _ => "ERR_UFFD_SYSTEM",
    }
}

impl PagerError {
    /// What is behind it, the nearest first.
    #[must_use]
    pub fn causes(&self) -> Vec<Cause> {
        let mut causes: Vec<Cause> = Vec::new();
        let mut next = self.source();
        while let Some(error) = next {
            // An errno does not know whose it is; what is above it does.
            let above = causes.last().map_or_else(|| self.syscall(), |cause| cause.syscall.clone());
            causes.push(link(error, above));
            next = error.source();
        }
        causes
    }
}

fn link(error: &(dyn Error + 'static), above: Option<String>) -> Cause {
    let boxed = error.downcast_ref::<Box<PagerError>>().map(AsRef::as_ref);
    let message = error.to_string();
    if let Some(error) = boxed.or_else(|| error.downcast_ref::<PagerError>()) {
        return Cause {
            code: error.code().to_owned(),
            message,
            errno: error.errno(),
            syscall: error.syscall(),
        };
    }
    if let Some(error) = error.downcast_ref::<UffdError>() {
        let syscall = error.operation().map(|operation| operation.to_string());
        return Cause { code: code_of(error).to_owned(), message, errno: error.errno(), syscall };
    }
    if let Some(errno) = error.downcast_ref::<Errno>() {
        let message = above.iter().fold(message, |message, call| format!("{message}, {call}"));
        return Cause { code: format!("{errno:?}"), message, errno: Some(*errno as i32), syscall: above };
    }
    let (code, syscall) = match error.downcast_ref::<AdoptError>() {
        Some(AdoptError::ProcessGone) => ("ERR_UFFD_CLOSED", None),
        Some(AdoptError::System { operation, .. }) => ("ERR_UFFD_SYSTEM", Some(operation.to_string())),
        Some(_) => ("ERR_UFFD_PROTOCOL", None),
        None => ("ERR_UFFD_SYSTEM", None),
    };
    Cause { code: code.to_owned(), message, errno: None, syscall }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_was_tried_again_leads_down_to_the_errno_of_its_last_read() {
        let cause = PagerError::Source { path: "/image".into(), syscall: "pread", errno: Errno::EIO };
        let error = PagerError::GaveUp { attempts: 3, ms: 20, cause: Box::new(cause) };

        let causes = error.causes();

        let said: Vec<(&str, Option<i32>, Option<&str>)> =
            causes.iter().map(|cause| (cause.code.as_str(), cause.errno, cause.syscall.as_deref())).collect();
        let (errno, call) = (Some(libc::EIO), Some("pread"));
        assert_eq!(said, [("ERR_UFFD_SOURCE", errno, call), ("EIO", errno, call)]);
        assert_eq!(causes.last().map(|cause| cause.message.as_str()), Some("EIO: I/O error, pread"));
    }

    #[test]
    fn an_operation_of_the_kernel_has_its_own_code() {
        let cause = UffdError::System { operation: uffd::Operation::Copy, errno: Errno::EFAULT };
        let error = PagerError::Kernel { address: 4096, len: 4096, cause };

        let codes: Vec<String> = error.causes().into_iter().map(|cause| cause.code).collect();

        assert_eq!(codes, ["ERR_UFFD_SYSTEM", "EFAULT"]);
        assert!(PagerError::Closed.causes().is_empty());
    }
}
