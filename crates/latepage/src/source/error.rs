//! What a source cannot do, and what to do about it.

use std::path::PathBuf;

use rustix::io::Errno;

/// Why a source cannot be opened, cannot serve a VM, or cannot supply a page.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// There is no such file.
    #[error("memory file {path}: there is no such file; check the path", path = path.display())]
    Missing {
        /// As it was given.
        path: PathBuf,
    },
    /// Opening it failed.
    #[error("memory file {path}: cannot be opened: {errno}; the pager needs to read it", path = path.display())]
    Unreadable {
        /// As it was given.
        path: PathBuf,
        /// What open(2) said.
        errno: Errno,
    },
    /// A directory, a device, a pipe, a socket.
    #[error("memory file {path}: it is {kind}, and a memory file is a regular file", path = path.display())]
    NotRegular {
        /// As it was given.
        path: PathBuf,
        /// What it is, with its article.
        kind: &'static str,
    },
    /// No bytes in it.
    #[error("memory file {path}: it is empty; was the snapshot written to its end?", path = path.display())]
    Empty {
        /// As it was given.
        path: PathBuf,
    },
    /// A VM's regions need more bytes, or fewer, than there are.
    #[error(
        "{what} has {source_bytes} bytes and the VM's regions end at {vm_bytes}: it is not this VM's snapshot"
    )]
    Size {
        /// The source, as [`describe`](super::Source::describe) has it.
        what: String,
        /// Bytes of the source.
        source_bytes: u64,
        /// The highest offset that the VM's regions name.
        vm_bytes: u64,
    },
    /// A range that the source never had. A pager that admitted the VM does not ask for it.
    #[error("memory file {path}: asked for {length} bytes at offset {offset}, and it has {size}", path = path.display())]
    Beyond {
        /// The file.
        path: PathBuf,
        /// Bytes from the start of the file.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Bytes of the file.
        size: u64,
    },
    /// It became shorter while it was served.
    #[error("memory file {path}: it was truncated while it was served: no page at offset {offset}, it had {size} bytes when it was opened; replace snapshots by rename(2), never in place", path = path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes from the start of the file.
        offset: u64,
        /// Bytes that it had when it was opened.
        size: u64,
    },
    /// The device or the file system failed.
    #[error("memory file {path}: reading at offset {offset} failed: {errno}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Bytes from the start of the file.
        offset: u64,
        /// What preadv2(2) said.
        errno: Errno,
    },
    /// Another process opened it for writing, and the kernel's patience with our lease was over.
    #[error("memory file {path}: another process opened it for writing, so what it holds now may be no snapshot; replace snapshots by rename(2), never in place", path = path.display())]
    OpenedForWriting {
        /// The file.
        path: PathBuf,
    },
    /// It was modified while it was served: no further VM is served from it.
    #[error("memory file {path}: it was modified while it was served ({how}); start a pager on the new snapshot", path = path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What differs: its size, or its time of modification.
        how: &'static str,
    },
    /// A program that supplies the contents could not.
    #[error("{what}: {reason}; asked for {length} bytes at offset {offset:#x}")]
    Foreign {
        /// The source, as [`describe`](super::Source::describe) has it.
        what: String,
        /// Bytes from the start of the memory.
        offset: u64,
        /// Bytes.
        length: u64,
        /// In one line.
        reason: String,
    },
    /// The code of the source has a fault.
    #[error("the source has a fault: it panicked: {message}")]
    Panicked {
        /// What the panic said.
        message: String,
    },
}
