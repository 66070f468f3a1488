//! A listening socket at a path: taken only if nobody else has it, and given back.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
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
        set_rights(path, mode, owner)?;
        rustix::net::listen(&made.fd, 1024).map_err(call("listen"))?;
        Ok(made)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Gives the socket that was just bound to its owner, with its mode.
///
/// The folder may be another user's, who can put a link or another file in the socket's place: so it is held by a descriptor,
/// and must be a socket that has no other name.
fn set_rights(path: &Path, mode: u32, owner: Option<(u32, u32)>) -> Result<(), ListenError> {
    let call = |call| move |errno| ListenError::Call { path: path.to_owned(), call, errno };
    let held = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(call("open"))?;
    let there = rustix::fs::fstat(&held).map_err(call("fstat"))?;
    if FileType::from_raw_mode(there.st_mode) != FileType::Socket || there.st_nlink != 1 {
        return Err(ListenError::NotSocket { path: path.to_owned(), what: "something else by now" });
    }
    if let Some((uid, gid)) = owner {
        let (user, group) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        rustix::fs::chownat(&held, "", user, group, AtFlags::EMPTY_PATH)
            .map_err(|errno| ListenError::Owner { path: path.to_owned(), uid, gid, errno })?;
    }
    // Of what is open as a path only, the kernel changes the mode by this name.
    rustix::fs::chmod(format!("/proc/self/fd/{}", held.as_raw_fd()), Mode::from_raw_mode(mode))
        .map_err(call("chmod"))
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn rights_are_given_to_a_socket_and_never_to_what_took_its_place() {
        let folder = std::env::temp_dir().join(format!("latepage-rights-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("socket");
        let (victim, other) = (folder.join("victim"), folder.join("other"));
        std::fs::write(&victim, "precious").unwrap();
        std::fs::set_permissions(&victim, std::fs::Permissions::from_mode(0o600)).unwrap();
        let _other = UnixListener::bind(&other).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        let before = mode(&other);
        let places: [&dyn Fn(); 4] = [
            &|| symlink(&victim, &path).unwrap(),
            &|| symlink(&other, &path).unwrap(),
            &|| std::fs::hard_link(&victim, &path).unwrap(),
            &|| std::fs::hard_link(&other, &path).unwrap(),
        ];
        for takes_its_place in places {
            takes_its_place();
            assert!(matches!(set_rights(&path, 0o666, None), Err(ListenError::NotSocket { .. })));
            std::fs::remove_file(&path).unwrap();
        }
        assert_eq!((mode(&victim), mode(&other)), (0o600, before));

        let _socket = UnixListener::bind(&path).unwrap();
        set_rights(&path, 0o604, None).unwrap();
        assert_eq!(mode(&path), 0o604);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
