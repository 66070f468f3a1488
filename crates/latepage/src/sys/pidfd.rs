//! A process, held so that its number cannot come to mean another.

use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

/// `SO_PEERPIDFD` of `asm-generic/socket.h` (Linux 6.5).
const SO_PEERPIDFD: libc::c_int = 77;

/// The other end of a Unix socket, as the kernel vouches for it (SO_PEERCRED).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process, or `None` where it lives in a pid namespace that this process cannot see.
    pub pid: Option<u32>,
    /// Its user, when it connected.
    pub uid: u32,
    /// Its group, when it connected.
    pub gid: u32,
}

/// Who connected.
///
/// # Errors
/// The errno of getsockopt(2).
pub fn peer(socket: impl AsFd) -> Result<Peer, Errno> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    get_option(socket.as_fd(), libc::SO_PEERCRED, &mut credentials)?;
    Ok(Peer {
        pid: u32::try_from(credentials.pid).ok().filter(|pid| *pid > 0),
        uid: credentials.uid,
        gid: credentials.gid,
    })
}

/// `T` must be plain old data: the kernel writes its bytes. Both callers are in this file.
fn get_option<T: Copy>(socket: BorrowedFd<'_>, option: libc::c_int, value: &mut T) -> Result<(), Errno> {
    let mut length = mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is exclusive plain data of `length` bytes, and the kernel writes no more than that.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            ptr::from_mut(value).cast(),
            &mut length,
        )
    };
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(())
}

/// A descriptor of a process: readable once it has ended.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
}

impl PidFd {
    /// The process at the other end of a Unix socket, or `None` where it cannot be seen from here or has ended.
    ///
    /// The kernel is asked for the very process that connected (Linux 6.5); before that its number is opened, which is right
    /// as long as it lives.
    pub fn of_peer(socket: impl AsFd) -> Option<Self> {
        let mut fd: RawFd = -1;
        if get_option(socket.as_fd(), SO_PEERPIDFD, &mut fd).is_ok() && fd >= 0 {
            // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
            return Some(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } });
        }
        Self::open(peer(socket).ok()?.pid?).ok()
    }

    /// The process with this number now.
    ///
    /// # Errors
    /// The errno of pidfd_open(2): ESRCH where there is none.
    pub fn open(pid: u32) -> Result<Self, Errno> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        Ok(Self { fd: rustix::process::pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// Kills it (SIGKILL).
    ///
    /// # Errors
    /// EPERM without the right to, ESRCH where it has ended.
    pub fn kill(&self) -> Result<(), Errno> {
        rustix::process::pidfd_send_signal(&self.fd, Signal::KILL)
    }

    /// Whether this process would have the right to kill it. Sends nothing.
    ///
    /// # Errors
    /// EPERM without the right to, ESRCH where it has ended.
    pub fn may_signal(&self) -> Result<(), Errno> {
        // SAFETY: pidfd_send_signal(2) with signal 0 and no siginfo only checks.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                0,
                ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if result < 0 {
            return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
        }
        Ok(())
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        let mut polled = [PollFd::new(&self.fd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(ready) if ready > 0)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
