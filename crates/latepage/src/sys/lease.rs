//! Read leases (fcntl(2), F_SETLEASE): the kernel holds back who opens a file for writing, or truncates it, until we let go.
//!
//! A lease that is being broken raises SIGIO, whose default is to end the process. So it is sent to one thread only
//! (F_OWNER_TID), which has it blocked and waits for it; no handler of the process is touched. It waits by sigtimedwait(2): a
//! signalfd wakes its poller at every signal to any thread of the process, and where faults are signals that would be every fault.
//!
//! Numbers from `include/uapi/asm-generic/fcntl.h`.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;

const F_SETOWN_EX: libc::c_int = 15;
const F_OWNER_TID: libc::c_int = 0;

/// `struct f_owner_ex`.
#[repr(C)]
struct OwnerEx {
    kind: libc::c_int,
    pid: libc::pid_t,
}
const _: () = assert!(size_of::<OwnerEx>() == 8);

/// The breaking of leases, as one thread is told of it. It stays on the thread that made it.
pub struct Breaks {
    signals: libc::sigset_t,
    /// The signal is blocked for the thread that made it, and sent to no other.
    thread: PhantomData<*const ()>,
}

impl Breaks {
    /// Blocks SIGIO for the calling thread, for good.
    ///
    /// # Errors
    /// What pthread_sigmask(3) said.
    pub fn on_this_thread() -> Result<Self, Errno> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `set` is writable and as long as the call expects.
        check(unsafe { libc::sigemptyset(set.as_mut_ptr()) })?;
        // SAFETY: sigemptyset has initialized it.
        let mut set = unsafe { set.assume_init() };
        // SAFETY: `set` is an initialized set, and SIGIO a signal's number.
        check(unsafe { libc::sigaddset(&raw mut set, libc::SIGIO) })?;
        // SAFETY: `set` is initialized; a null old set is allowed.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if result != 0 {
            return Err(Errno::from_raw_os_error(result));
        }
        Ok(Self { signals: set, thread: PhantomData })
    }

    /// Takes a read lease. From then on [`wait`](Self::wait) ends when somebody wants to write.
    ///
    /// # Errors
    /// `AGAIN`: it is open for writing somewhere. `ACCESS`: another user's file, and no CAP_LEASE. `INVAL`: the file system
    /// has no leases.
    pub fn take(&self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        let owner = OwnerEx { kind: F_OWNER_TID, pid: rustix::thread::gettid().as_raw_nonzero().get() };
        // SAFETY: F_SETOWN_EX reads one `f_owner_ex`, which `owner` is and outlives the call.
        check(unsafe { libc::fcntl(file.as_raw_fd(), F_SETOWN_EX, &raw const owner) })?;
        set(file, libc::F_RDLCK)
    }

    /// Waits until somebody wants to write, another thread [`wake`]s this one, or the time is over; or ends for no reason.
    pub fn wait(&self, timeout: Duration) {
        let timeout = libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // SAFETY: both are initialized and outlive the call; a null siginfo is allowed.
        let _ =
            unsafe { libc::sigtimedwait(&raw const self.signals, std::ptr::null_mut(), &raw const timeout) };
    }
}

impl std::fmt::Debug for Breaks {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Breaks").finish_non_exhaustive()
    }
}

/// Ends the [`wait`](Breaks::wait) of a thread that has [`Breaks`], or its next one.
///
/// A thread that has ended is not joined before its handle is gone: so it can be no other one that gets the signal.
pub fn wake<T>(thread: &JoinHandle<T>) {
    // SAFETY: the handle keeps the thread's name valid, and the signal is blocked there until its end.
    let _ = unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGIO) };
}

/// Whether our lease stands: held, and nobody asks for it.
///
/// # Errors
/// What fcntl(2) said.
pub fn stands(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    // SAFETY: F_GETLEASE takes no argument.
    let found = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) })?;
    Ok(found == libc::F_RDLCK)
}

/// Whether a writer waits behind our lease, which is being broken. (Asking for the same lease again is refused as long as
/// somebody has the file open for writing, and who waits in open(2) counts: `fs/locks.c`, `check_conflicting_open`.)
pub fn writer_waits(file: BorrowedFd<'_>) -> bool {
    set(file, libc::F_RDLCK).is_err()
}

/// Lets go: who waits goes on.
///
/// # Errors
/// What fcntl(2) said: `AGAIN` if there was none.
pub fn release(file: BorrowedFd<'_>) -> Result<(), Errno> {
    set(file, libc::F_UNLCK)
}

fn set(file: BorrowedFd<'_>, kind: libc::c_int) -> Result<(), Errno> {
    // SAFETY: F_SETLEASE takes its argument by value.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) }).map(drop)
}

fn check(result: libc::c_int) -> Result<libc::c_int, Errno> {
    if result == -1 {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    } else {
        Ok(result)
    }
}
