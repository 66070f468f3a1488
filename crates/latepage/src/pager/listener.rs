//! A listening socket at a path: taken only if nobody else has it, and given back.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Why a path cannot be listened at.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Someone answers there.
    #[error("socket {path}: another process is listening there; stop it, or choose another path", path = path.display())]
    Live {
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("socket {path}: there is {what} of that name, which is not replaced; choose another path", path = path.display())]
    NotSocket {
        /// The path.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A Unix socket's path has a limit.
    #[error("socket {path}: the path has {length} bytes and a socket's can have 107; choose a shorter one, or a relative one", path = path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// Only root gives files away.
    #[error("socket {path}: it cannot be given to {uid}:{gid}: {errno}; that takes root (CAP_CHOWN): run as root, or leave --owner out", path = path.display())]
    Owner {
        /// The path.
        path: PathBuf,
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// What the kernel said.
        errno: Errno,
    },
    /// A call failed.
    #[error("socket {path}: {call}: {errno}", path = path.display())]
    Call {
        /// The path.
        path: PathBuf,
        /// The call.
        call: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// The pager takes no new VMs.
    #[error("socket {path}: the pager is draining and takes no new VMs", path = path.display())]
    Draining {
        /// The path.
        path: PathBuf,
    },
}

/// A listening socket. Its path is removed when it is dropped.
#[derive(Debug)]
pub(super) struct ListeningSocket {
    fd: OwnedFd,
    path: PathBuf,
    /// Device and inode: the path is removed only while it still is this socket.
    identity: Option<(u64, u64)>,
}

/// The longest path that fits into `sockaddr_un` with its closing zero.
const LONGEST_PATH: usize = 107;

impl ListeningSocket {
    pub(super) fn bind(path: &Path, mode: u32, owner: Option<(u32, u32)>) -> Result<Self, ListenError> {
        let owned = || path.to_owned();
        let call = |call| move |errno| ListenError::Call { path: path.to_owned(), call, errno };
        let length = path.as_os_str().len();
        if length > LONGEST_PATH {
            return Err(ListenError::TooLong { path: owned(), length });
        }
        let address = SocketAddrUnix::new(path).map_err(call("address"))?;
        let socket = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        };
        if let Ok(there) = std::fs::symlink_metadata(path) {
            let kind = there.file_type();
            if !kind.is_socket() {
                let what = if kind.is_dir() {
                    "a directory"
                } else if kind.is_symlink() {
                    "a link"
                } else {
                    "a file"
                };
                return Err(ListenError::NotSocket { path: owned(), what });
            }
            match rustix::net::connect(socket().map_err(call("socket"))?, &address) {
                // A socket file that nobody has open any more.
                Err(Errno::CONNREFUSED) => rustix::fs::unlink(path).map_err(call("unlink"))?,
                Ok(()) | Err(Errno::AGAIN) => return Err(ListenError::Live { path: owned() }),
                // Another kind of socket is just as alive.
                Err(Errno::PROTOTYPE) => return Err(ListenError::Live { path: owned() }),
                Err(errno) => return Err(call("connect")(errno)),
            }
        }
        let fd = socket().map_err(call("socket"))?;
        rustix::net::bind(&fd, &address).map_err(|errno| match errno {
            Errno::ADDRINUSE => ListenError::Live { path: owned() },
            errno => call("bind")(errno),
        })?;
        let identity = std::fs::symlink_metadata(path).ok().map(|there| (there.dev(), there.ino()));
        let made = Self { fd, path: owned(), identity };
        // Nobody can connect before listen(2), so nobody does with other rights than these.
        if let Some((uid, gid)) = owner {
            std::os::unix::fs::lchown(path, Some(uid), Some(gid)).map_err(|error| ListenError::Owner {
                path: owned(),
                uid,
                gid,
                errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
            })?;
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
            .map_err(|error| call("chmod")(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
        rustix::net::listen(&made.fd, 1024).map_err(call("listen"))?;
        Ok(made)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for ListeningSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        let there = std::fs::symlink_metadata(&self.path).ok().map(|there| (there.dev(), there.ino()));
        if there.is_some() && there == self.identity {
            // It may have been removed by someone else just now; then nothing is left to do.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
