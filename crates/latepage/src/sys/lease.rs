//! Read leases (fcntl(2), F_SETLEASE): the kernel holds back who opens a file for writing, or truncates it, until we let go.
//!
//! A lease that is being broken raises SIGIO, whose default is to end the process. So it is sent to one thread only
//! (F_OWNER_TID), which has it blocked and takes it from a descriptor; no handler of the process is touched.
//!
//! Numbers from `include/uapi/asm-generic/fcntl.h`.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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
#[derive(Debug)]
pub struct Breaks {
    signals: OwnedFd,
    /// The signal is blocked for the thread that made it, and sent to no other.
    thread: PhantomData<*const ()>,
}

impl Breaks {
    /// Blocks SIGIO for the calling thread, for good, and opens a descriptor that is readable when one is pending.
    ///
    /// # Errors
    /// What signalfd(2) said.
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
        // SAFETY: `set` is initialized; -1 asks for a new descriptor.
        let fd =
            check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })?;
        // SAFETY: the call has just made it, and nobody else knows it.
        let signals = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { signals, thread: PhantomData })
    }

    /// Takes a read lease. From then on this thread's descriptor is readable when somebody wants to write.
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

    /// Takes the pending signals away, so that the descriptor waits for the next one.
    pub fn drain(&self) {
        let mut record = [0; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.signals, &mut record).is_ok() {}
    }
}

impl AsFd for Breaks {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
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
