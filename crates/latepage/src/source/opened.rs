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
    identity: Identity,
}

/// All of a file that changes when somebody writes it, and which file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    /// Time of modification: seconds and nanoseconds.
    modified: (i64, i64),
    /// Time of the last change of anything about it, which nobody can set.
    changed: (i64, i64),
}

impl Identity {
    /// How many words it takes.
    pub(super) const WORDS: usize = 7;

    fn of(stat: &Stat) -> Self {
        // Types differ between architectures.
        #[allow(clippy::unnecessary_cast)]
        Self {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            size: stat.st_size as u64,
            modified: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            changed: (stat.st_ctime as i64, stat.st_ctime_nsec as i64),
        }
    }

    pub(super) fn words(&self) -> [u64; Self::WORDS] {
        let Self { device, inode, size, modified, changed } = *self;
        let times = [modified.0, modified.1, changed.0, changed.1].map(|number| number as u64);
        [device, inode, size, times[0], times[1], times[2], times[3]]
    }

    /// Whether nothing about the file was changed at that second or after it.
    pub(super) fn is_older_than(&self, second: i64) -> bool {
        self.modified.0 < second && self.changed.0 < second
    }

    /// A name for what is kept of the file.
    pub(super) fn name(&self) -> String {
        format!("{:x}-{:x}", self.device, self.inode)
    }
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
        Ok(Self { fd, path, size, identity: Identity::of(&stat) })
    }

    /// What it is now, if that is what it was when it was opened.
    pub(super) fn identity(&self) -> Option<Identity> {
        let now = Identity::of(&rustix::fs::fstat(&self.fd).ok()?);
        (now == self.identity).then_some(now)
    }

    /// What about the file is no longer as it was, if anything.
    pub(super) fn difference(&self) -> Option<&'static str> {
        match rustix::fs::fstat(&self.fd) {
            Ok(stat) if stat.st_size as u64 != self.size => Some("its size differs"),
            Ok(stat) if Identity::of(&stat).modified != self.identity.modified => {
                Some("its time of modification differs")
            }
            Ok(_) => None,
            Err(_) => Some("it cannot be looked at any more"),
        }
    }
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
