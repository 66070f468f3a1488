//! A regular file that was opened, and what it was then.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::SourceError;

/// The file, and what it was when it was opened.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
    pub(super) size: u64,
    /// Time of modification: seconds and nanoseconds.
    modified: (i64, i64),
}

impl Opened {
    /// Opens it for reading.
    ///
    /// # Errors
    /// [`SourceError`]: there is none, it cannot be read, it is no regular file, it is empty.
    pub(super) fn open(path: PathBuf) -> Result<Self, SourceError> {
        // O_NONBLOCK: opening a pipe or a device must not wait. It means nothing for regular files.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let fd = match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Err(SourceError::Missing { path }),
            Err(Errno::NXIO) => {
                return Err(SourceError::NotRegular { path, kind: "a socket or a device without a driver" });
            }
            Err(errno) => return Err(SourceError::Unreadable { path, errno }),
        };
        let stat = match rustix::fs::fstat(&fd) {
            Ok(stat) => stat,
            Err(errno) => return Err(SourceError::Unreadable { path, errno }),
        };
        if let Some(kind) = irregular(&stat) {
            return Err(SourceError::NotRegular { path, kind });
        }
        let size = stat.st_size as u64;
        if size == 0 {
            return Err(SourceError::Empty { path });
        }
        Ok(Self { fd, path, size, modified: modified(&stat) })
    }

    /// What about the file is no longer as it was, if anything.
    pub(super) fn difference(&self) -> Option<&'static str> {
        match rustix::fs::fstat(&self.fd) {
            Ok(stat) if stat.st_size as u64 != self.size => Some("its size differs"),
            Ok(stat) if modified(&stat) != self.modified => Some("its time of modification differs"),
            Ok(_) => None,
            Err(_) => Some("it cannot be looked at any more"),
        }
    }
}

fn modified(stat: &Stat) -> (i64, i64) {
    // The type of the nanoseconds differs between architectures.
    #[allow(clippy::unnecessary_cast)]
    (stat.st_mtime as i64, stat.st_mtime_nsec as i64)
}

/// What a file is that is no regular one.
fn irregular(stat: &Stat) -> Option<&'static str> {
    Some(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => return None,
        FileType::Directory => "a directory",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        _ => "something else",
    })
}
