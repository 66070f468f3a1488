//! Regular files: reading what is in the page cache and nothing else, and finding holes. No unsafe code is needed for it.

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Access, AtFlags, Mode, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

/// `TMPFS_MAGIC` (`linux/magic.h`).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Reads what is in memory now, preadv2(2) with RWF_NOWAIT: a prefix of what was asked if the rest would need the device.
///
/// # Errors
/// `AGAIN`: not even the first byte is in memory. `OPNOTSUPP`: the file system cannot tell (tmpfs among them).
pub fn read_cached(file: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    read_with(file, buffer, offset, ReadWriteFlags::NOWAIT)
}

/// Reads, waiting for the device; 0 bytes at the end of the file. May come short.
///
/// # Errors
/// What preadv2(2) said.
pub fn read(file: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    read_with(file, buffer, offset, ReadWriteFlags::empty())
}

fn read_with(
    file: BorrowedFd<'_>,
    buffer: &mut [u8],
    offset: u64,
    flags: ReadWriteFlags,
) -> Result<usize, Errno> {
    loop {
        match rustix::io::preadv2(file, &mut [IoSliceMut::new(buffer)], offset, flags) {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Where the next data begins, at `offset` or after it; `None` if there is only a hole up to the end.
///
/// # Errors
/// `INVAL`: the file system knows no holes.
pub fn next_data(file: BorrowedFd<'_>, offset: u64) -> Result<Option<u64>, Errno> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Where the next hole begins, at `offset` or after it; the end of the file counts as one.
///
/// # Errors
/// As [`next_data`], and `NXIO` past the end.
pub fn next_hole(file: BorrowedFd<'_>, offset: u64) -> Result<u64, Errno> {
    rustix::fs::seek(file, SeekFrom::Hole(offset))
}

/// Whether all of the file is in memory by its nature: on tmpfs, while the machine has no swap.
pub fn lives_in_memory(file: BorrowedFd<'_>) -> bool {
    let on_tmpfs = rustix::fs::fstatfs(file).is_ok_and(|found| found.f_type as u64 == TMPFS_MAGIC);
    // One line of headings, then one for each swap device.
    on_tmpfs && fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().count() <= 1)
}

/// Whether the kernel tells this process which pages of a file are in memory (`mm/mincore.c`, `can_do_mincore`): of its own files,
/// and of those that it may write.
pub fn tells_what_is_cached(file: BorrowedFd<'_>) -> bool {
    let own = rustix::fs::fstat(file).is_ok_and(|stat| stat.st_uid == rustix::process::geteuid().as_raw());
    let flags = AtFlags::EACCESS | AtFlags::EMPTY_PATH;
    own || rustix::fs::accessat(file, "", Access::WRITE_OK, flags).is_ok()
}

/// How many bytes the kernel is told to read ahead on the device that a file lies on; 128 KiB, its own choice, where that is not known.
pub fn read_ahead(file: BorrowedFd<'_>) -> u64 {
    let told = || {
        let device = rustix::fs::fstat(file).ok()?.st_dev;
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        // A partition's is its disk's.
        let setting = [
            format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"),
            format!("/sys/dev/block/{major}:{minor}/../queue/read_ahead_kb"),
        ];
        let text = setting.iter().find_map(|path| fs::read_to_string(path).ok())?;
        text.trim().parse::<u64>().ok()
    };
    told().unwrap_or(128) << 10
}

/// Opens a file once more for reading: an open file of its own, with its own place in what the kernel reads ahead.
///
/// # Errors
/// What open(2) of /proc/self/fd said.
pub fn open_again(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
}
