//! What the kernel offers and lets this process do, asked by trying.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;

/// `KCMP_FILE` (`linux/kcmp.h`).
const KCMP_FILE: libc::c_int = 0;

/// `struct io_uring_params` (`linux/io_uring.h`): all zero asks for the defaults, and the kernel writes what it made.
const IO_URING_PARAMS: usize = 120;

/// Whether two descriptors of two processes are one open file, as they are where one was sent to the other.
///
/// # Errors
/// EPERM without the right to look into both processes (ptrace's), ESRCH and EBADF where one has gone, ENOSYS where the
/// kernel was built without kcmp(2).
pub fn same_open_file(one: (u32, RawFd), other: (u32, RawFd)) -> Result<bool, Errno> {
    // SAFETY: kcmp(2) takes numbers only.
    let order = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            one.0 as libc::pid_t,
            other.0 as libc::pid_t,
            KCMP_FILE,
            one.1 as libc::c_ulong,
            other.1 as libc::c_ulong,
        )
    };
    if order < 0 { Err(last_errno()) } else { Ok(order == 0) }
}

/// Makes an io_uring of one entry and closes it.
///
/// # Errors
/// EPERM where kernel.io_uring_disabled or a seccomp filter forbids it, ENOSYS where the kernel has none.
pub fn io_uring() -> Result<(), Errno> {
    let mut params = [0_u64; IO_URING_PARAMS / 8];
    // SAFETY: `params` is exclusive, zeroed, and as long as the structure that the kernel reads and writes.
    let made = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    if made < 0 {
        return Err(last_errno());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    drop(unsafe { OwnedFd::from_raw_fd(made as RawFd) });
    Ok(())
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::sys::uffd::{Features, Userfaultfd};

    #[test]
    fn every_process_may_ask_for_the_features_of_userfaultfd() {
        match (Userfaultfd::offered_to_user_space(), Userfaultfd::offered()) {
            (Err(errno), _) => eprintln!("skipped: userfaultfd(2): {errno}"),
            (Ok(asked), Ok(offered)) => assert_eq!(asked, offered),
            (Ok(asked), Err(_)) => assert!(asked.contains(Features::EVENT_REMOVE)),
        }
    }

    #[test]
    fn a_duplicate_is_the_same_open_file_and_another_open_is_not() {
        let me = std::process::id();
        let file = std::fs::File::open("/dev/null").unwrap();
        let (again, duplicate) = (std::fs::File::open("/dev/null").unwrap(), file.try_clone().unwrap());
        let compare = |other: &std::fs::File| same_open_file((me, file.as_raw_fd()), (me, other.as_raw_fd()));
        if compare(&file) == Err(Errno::NOSYS) {
            eprintln!("skipped: this kernel has no kcmp(2)");
            return;
        }
        assert_eq!(compare(&duplicate), Ok(true));
        assert_eq!(compare(&again), Ok(false));
        assert_eq!(same_open_file((me, file.as_raw_fd()), (me, 1 << 20)), Err(Errno::BADF));
    }
}
