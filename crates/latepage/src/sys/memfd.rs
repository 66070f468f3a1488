//! Memory files: memory that two processes can map.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use rustix::io::Errno;

/// Makes a memory file of `length` bytes, sealed so that nobody can shrink it: a truncated mapping is a SIGBUS.
///
/// # Errors
/// The errno of the call that failed.
pub fn create(name: &str, length: u64) -> Result<OwnedFd, Errno> {
    create_sealed(name, length, SealFlags::SHRINK | SealFlags::SEAL)
}

/// Makes a memory file whose length is `length` bytes for good: what two processes keep words in.
///
/// # Errors
/// The errno of the call that failed.
pub fn create_fixed(name: &str, length: u64) -> Result<OwnedFd, Errno> {
    create_sealed(name, length, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
}

fn create_sealed(name: &str, length: u64, seals: SealFlags) -> Result<OwnedFd, Errno> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, length)?;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file)
}

/// Why a memory file cannot hold words that two processes share.
#[derive(Debug, thiserror::Error)]
pub enum NotFixed {
    /// Not a kind of file that has seals.
    #[error("it is no memory file (memfd_create(2)): {0}")]
    NotMemory(Errno),
    /// Its length can still change.
    #[error("its length can still change: add F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_SEAL before sending it")]
    Unsealed,
    /// Its pages are huge ones: touching one that the pool does not have is a SIGBUS.
    #[error("it is made of huge pages: make it without MFD_HUGETLB")]
    HugePages,
    /// It cannot be written from here.
    #[error(
        "it cannot be written: open it for reading and writing, and leave F_SEAL_WRITE and F_SEAL_FUTURE_WRITE away"
    )]
    NotWritable,
    /// It is longer or shorter than it must be.
    #[error("it has {length} bytes and must have {needed}")]
    Length {
        /// Its length.
        length: u64,
        /// What it must be.
        needed: u64,
    },
}

/// Checks that a foreign memory file can be mapped, read and written, and keeps its length, which is returned, in bytes.
///
/// # Errors
/// [`NotFixed`].
pub fn check_fixed(file: BorrowedFd<'_>) -> Result<u64, NotFixed> {
    let seals = rustix::fs::fcntl_get_seals(file).map_err(NotFixed::NotMemory)?;
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL) {
        return Err(NotFixed::Unsealed);
    }
    if is_huge(file).map_err(NotFixed::NotMemory)? {
        return Err(NotFixed::HugePages);
    }
    let access = rustix::fs::fcntl_getfl(file).map_err(NotFixed::NotMemory)?;
    if access & OFlags::ACCMODE != OFlags::RDWR
        || seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE)
    {
        return Err(NotFixed::NotWritable);
    }
    Ok(rustix::fs::fstat(file).map_err(NotFixed::NotMemory)?.st_size as u64)
}

/// Why a descriptor cannot be mapped without fear of its sender.
#[derive(Debug, thiserror::Error)]
pub enum NotSealed {
    /// Not a kind of file that has seals.
    #[error("it is no memory file (memfd_create(2)): {0}")]
    NotMemory(Errno),
    /// It has seals, but too few.
    #[error("it can still be shrunk: add F_SEAL_SHRINK and F_SEAL_SEAL before sending it")]
    Missing,
    /// Its pages are huge ones: writing where the pool has none is a SIGBUS, and mapping it rounds up to them.
    #[error("it is made of huge pages: huge pages are copied in, leave \"memory\" out of the descriptors")]
    HugePages,
    /// It is too short.
    #[error("it has {length} bytes and the regions need {needed}")]
    Short {
        /// Its length.
        length: u64,
        /// What was needed.
        needed: u64,
    },
}

/// Checks that a foreign memory file can be mapped for `needed` bytes and will stay so.
///
/// # Errors
/// [`NotSealed`].
pub fn check_sealed(file: BorrowedFd<'_>, needed: u64) -> Result<(), NotSealed> {
    let seals = rustix::fs::fcntl_get_seals(file).map_err(NotSealed::NotMemory)?;
    if !seals.contains(SealFlags::SHRINK | SealFlags::SEAL) {
        return Err(NotSealed::Missing);
    }
    if is_huge(file).map_err(NotSealed::NotMemory)? {
        return Err(NotSealed::HugePages);
    }
    let length = rustix::fs::fstat(file).map_err(NotSealed::NotMemory)?.st_size as u64;
    if length < needed {
        return Err(NotSealed::Short { length, needed });
    }
    Ok(())
}

/// Whether a file lies on hugetlbfs, as one made with MFD_HUGETLB does.
///
/// # Errors
/// The errno of fstatfs(2).
pub fn is_huge(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    /// `HUGETLBFS_MAGIC` of `linux/magic.h`.
    const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;
    Ok(rustix::fs::fstatfs(file)?.f_type as u32 == HUGETLBFS_MAGIC)
}
