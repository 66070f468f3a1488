//! What a source has to tell, beside its answers.

use std::path::PathBuf;
use std::time::Duration;

use rustix::io::Errno;

/// Why no lease was granted. The file is then watched by its size and time of modification, once a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoLease {
    /// A process has it open for writing.
    #[error("another process has it open for writing")]
    Writer,
    /// The file is another user's, and the pager has no CAP_LEASE.
    #[error("the file belongs to another user, and the pager has no CAP_LEASE")]
    NotOwner,
    /// The file system has no leases, or none that this call could have.
    #[error("the file system grants none: {0}")]
    Refused(Errno),
}

/// Something that the operator should know. Its text is one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceNotice {
    /// The file is not protected against being written in place.
    #[error("memory file {path}: no read lease: {why}; it is watched for changes instead", path = path.display())]
    NoLease {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: NoLease,
    },
    /// The zero map of the file is not used, or not made: its zero pages are found anew.
    #[error("memory file {path}: zero map {map}: {what}", path = path.display(), map = map.display())]
    ZeroMap {
        /// The file.
        path: PathBuf,
        /// The map.
        map: PathBuf,
        /// What is the matter, and what is done.
        what: String,
    },
    /// It was written, or touched, and no lease was there to hold the writer back.
    #[error("memory file {path}: it was modified while it is served ({how}): pages from now on may not be the snapshot's, and no further VM is served from it", path = path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What differs: its size, or its time of modification.
        how: &'static str,
    },
    /// The writer that was let in has modified it. Reads have failed since it came, and will.
    #[error("memory file {path}: the writer modified it ({how}): no VM is served from it any more; start a pager on the new snapshot", path = path.display())]
    Rewritten {
        /// The file.
        path: PathBuf,
        /// What differs: its size, or its time of modification.
        how: &'static str,
    },
    /// A process wants to write it, and is held back.
    #[error("memory file {path}: another process opens it for writing and is held back; what the VMs still lack in {seconds} s fails closed", path = path.display(), seconds = remaining.as_secs())]
    LeaseBreaking {
        /// The file.
        path: PathBuf,
        /// From the notice to the moment when reads begin to fail.
        remaining: Duration,
    },
    /// Every VM was full in time: the writer may go on.
    #[error("memory file {path}: every VM has its memory; the writer may go on", path = path.display())]
    LeaseReleased {
        /// The file.
        path: PathBuf,
    },
    /// The time was over. Reads fail from now on.
    #[error("memory file {path}: the kernel lets the writer in; what the VMs still lack fails closed", path = path.display())]
    LeaseLost {
        /// The file.
        path: PathBuf,
    },
    /// The writer is gone without having changed anything: all is as before.
    #[error("memory file {path}: the writer is gone, nothing was changed; it is served again, under a lease", path = path.display())]
    LeaseRegained {
        /// The file.
        path: PathBuf,
    },
}
