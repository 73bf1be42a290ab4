//! Errors of `crates/uffd` as data.

use pager::code_of;
use uffd::{AdoptError, CreateError, MappingError, UffdError, limit_behind};

use crate::values::NativeError;

fn failure(code: &str, message: String, errno: Option<i32>, syscall: Option<&str>) -> NativeError {
    let hint = syscall.zip(errno).and_then(|(call, errno)| limit_behind(call, errno));
    NativeError {
        code: code.to_owned(),
        message,
        errno,
        syscall: syscall.map(str::to_owned),
        hint,
        causes: None,
    }
}

impl From<UffdError> for NativeError {
    fn from(error: UffdError) -> Self {
        failure(
            code_of(&error),
            error.to_string(),
            error.errno(),
            error.operation().map(uffd::Operation::as_str),
        )
    }
}

impl From<CreateError> for NativeError {
    fn from(error: CreateError) -> Self {
        let (code, syscall) = match error {
            CreateError::Unsupported { .. } | CreateError::NoUserfaultfd { .. } => {
                ("ERR_UFFD_UNSUPPORTED", None)
            }
            CreateError::NotPermitted { .. } => ("ERR_UFFD_NOT_PERMITTED", Some("userfaultfd")),
            CreateError::ForkNotPermitted => ("ERR_UFFD_NOT_PERMITTED", Some("UFFDIO_API")),
            CreateError::System { syscall, .. } => ("ERR_UFFD_SYSTEM", Some(syscall)),
            _ => ("ERR_UFFD_SYSTEM", None),
        };
        failure(code, error.to_string(), error.errno(), syscall)
    }
}

impl From<AdoptError> for NativeError {
    fn from(error: AdoptError) -> Self {
        match error {
            AdoptError::ProcessGone => failure("ERR_UFFD_CLOSED", error.to_string(), Some(libc::ESRCH), None),
            AdoptError::System { operation, errno } => {
                failure("ERR_UFFD_SYSTEM", error.to_string(), Some(errno as i32), Some(operation.as_str()))
            }
            _ => failure("ERR_UFFD_PROTOCOL", error.to_string(), Some(libc::EINVAL), None),
        }
    }
}

impl From<MappingError> for NativeError {
    fn from(error: MappingError) -> Self {
        let (code, syscall) = match error {
            MappingError::HugePagesExhausted { .. } => ("ERR_UFFD_EXHAUSTED", Some("mmap")),
            MappingError::UnsupportedPageSize { .. } | MappingError::Unsupported { .. } => {
                ("ERR_UFFD_UNSUPPORTED", None)
            }
            MappingError::System { syscall, .. } => ("ERR_UFFD_SYSTEM", Some(syscall)),
            _ => ("ERR_UFFD_SYSTEM", None),
        };
        failure(code, error.to_string(), Some(error.errno()), syscall)
    }
}

/// A descriptor number that is none, or a handle that was closed.
pub(crate) fn closed(what: &str) -> NativeError {
    failure("ERR_UFFD_USE_AFTER_CLOSE", format!("the {what} is closed"), Some(libc::EBADF), None)
}

/// A userfaultfd that another object has, too.
pub(crate) fn in_use() -> NativeError {
    let message = "the userfaultfd has a clone, or is in use on another thread: close its clones first";
    failure("ERR_UFFD_CLONE", message.to_owned(), Some(libc::EBUSY), None)
}

/// A userfaultfd whose messages go to a handler.
pub(crate) fn handled() -> NativeError {
    let message = "a fault handler has the messages of this userfaultfd";
    failure("ERR_UFFD_IN_USE", message.to_owned(), Some(libc::EBUSY), None)
}

/// A system call of the binding's own.
pub(crate) fn system(syscall: &str, error: &std::io::Error) -> NativeError {
    failure("ERR_UFFD_SYSTEM", format!("{syscall}: {error}"), error.raw_os_error(), Some(syscall))
}
