//! Sleeping on a word of shared memory (futex(2)), across processes.

use std::ptr;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use rustix::io::Errno;

/// Sleeps while the low half of the word is `low`, for `timeout` at most.
///
/// The kernel compares the 32 bits at the word's address, which are its low half on the little-endian machines that this crate is
/// for.
///
/// # Errors
/// EAGAIN where it is another value already, ETIMEDOUT, EINTR after a signal.
pub fn wait(word: &AtomicU64, low: u32, timeout: Option<Duration>) -> Result<(), Errno> {
    let timeout = timeout.map(|timeout| libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let until: *const libc::timespec = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: the word is live memory, aligned to 8; the kernel reads 4 bytes of it, atomically, and the time, and writes neither.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, low, until) };
    if result < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Wakes `sleepers` of those who sleep on the word. Who does not sleep any more is no error.
pub fn wake(word: &AtomicU64, sleepers: i32) {
    // SAFETY: the kernel takes the address for a key, and touches no memory.
    let woken = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, sleepers) };
    debug_assert!(woken >= 0, "{}", last_errno());
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

const _: () = assert!(cfg!(target_endian = "little"), "the low half of a word would lie at its end");

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn a_word_that_is_another_already_is_no_sleep() {
        let word = AtomicU64::new(0xffff_ffff_0000_0007);
        assert_eq!(wait(&word, 8, None), Err(Errno::AGAIN));
        assert_eq!(wait(&word, 7, Some(Duration::ZERO)), Err(Errno::TIMEDOUT));
        wake(&word, 1);
    }

    #[test]
    fn who_sleeps_is_woken() {
        let word = Arc::new(AtomicU64::new(1));
        let sleeper = {
            let word = Arc::clone(&word);
            std::thread::spawn(move || {
                while word.load(Ordering::Acquire) == 1 {
                    let _ = wait(&word, 1, None);
                }
            })
        };
        word.store(2, Ordering::Release);
        wake(&word, 1);
        sleeper.join().unwrap();
    }
}
