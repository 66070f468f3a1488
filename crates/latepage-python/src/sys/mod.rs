//! The crate's only unsafe code: descriptors that Python names by their number.

#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;

/// A descriptor of our own for what `number` stands for.
///
/// # Errors
/// EBADF where it stands for nothing.
pub(crate) fn duplicate(number: RawFd) -> Result<OwnedFd, Errno> {
    if number < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: the number is not -1, and the borrow ends with the next line. Should it be closed or reused meanwhile, the
    // kernel answers EBADF or duplicates what then has the number: no memory of ours depends on it.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_dupfd_cloexec(borrowed, 3)
}
