//! Mappings of memory: a guest view, an install view, or a file.

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::memfd;

/// Mappings start at a multiple of this, so that a 2 MiB page of guest memory is one of the host's too.
const ALIGNMENT: usize = 2 << 20;

/// A mapping failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} of {length:#x} bytes: {errno}{}", hint(.call, *.errno))]
pub struct MapError {
    /// The call that failed.
    pub call: &'static str,
    /// Bytes asked for.
    pub length: usize,
    /// What the kernel said.
    pub errno: Errno,
}

fn hint(call: &str, errno: Errno) -> &'static str {
    match (call, errno) {
        ("mmap(hugetlb)", Errno::NOMEM) => " (too few huge pages: raise vm.nr_hugepages)",
        _ => "",
    }
}

/// Memory mapped into this process, unmapped when dropped.
///
/// Others may change it at any time: a guest, or another process through another view. So it is never lent out as a slice; it
/// is copied from and to, and single words are read and written atomically.
#[derive(Debug)]
pub struct Mapping {
    base: *mut u8,
    length: usize,
}

// SAFETY: the mapping belongs to this value alone, is valid in every thread, and is only reached through copies and atomics.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private zero memory.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn anonymous(length: usize) -> Result<Self, MapError> {
        Self::map(
            "mmap(anonymous)",
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
            None,
        )
    }

    /// Private zero memory in 2 MiB pages from the machine's pool.
    ///
    /// # Errors
    /// [`MapError`]: ENOMEM where the pool is too small.
    pub fn hugetlb(length: usize) -> Result<Self, MapError> {
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        Self::map("mmap(hugetlb)", length, ProtFlags::READ | ProtFlags::WRITE, flags, None)
    }

    /// Like [`hugetlb`](Self::hugetlb), but takes nothing from the pool until a page is touched (as Firecracker maps).
    ///
    /// # Errors
    /// [`MapError`].
    pub fn hugetlb_unreserved(length: usize) -> Result<Self, MapError> {
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB | MapFlags::NORESERVE;
        Self::map("mmap(hugetlb)", length, ProtFlags::READ | ProtFlags::WRITE, flags, None)
    }

    /// A file's bytes from `offset`, shared with everyone who maps it.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn shared(file: BorrowedFd<'_>, offset: u64, length: usize) -> Result<Self, MapError> {
        Self::map(
            "mmap(shared)",
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            Some((file, offset)),
        )
    }

    /// A file's bytes from `offset`, copied when written.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn private(file: BorrowedFd<'_>, offset: u64, length: usize) -> Result<Self, MapError> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        Self::map("mmap(private)", length, ProtFlags::READ | ProtFlags::WRITE, flags, Some((file, offset)))
    }

    /// A file's bytes from its start, to be looked at only through [`window`](Self::window)s: a store would be a SIGSEGV, and
    /// a load from a file that somebody has truncated a SIGBUS.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn read_only(file: BorrowedFd<'_>, length: usize) -> Result<Self, MapError> {
        Self::map("mmap(read-only)", length, ProtFlags::READ, MapFlags::SHARED, Some((file, 0)))
    }

    fn map(
        call: &'static str,
        length: usize,
        protection: ProtFlags,
        flags: MapFlags,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<Self, MapError> {
        let failed = |errno| MapError { call, length, errno };
        // Huge pages are mapped whole: the kernel would round the length up, and past what was reserved for it.
        let huge = flags.contains(MapFlags::HUGETLB);
        if huge && !length.is_multiple_of(ALIGNMENT)
            || file.is_some_and(|(file, _)| memfd::is_huge(file) != Ok(false))
        {
            return Err(failed(Errno::INVAL));
        }
        let whole = length.checked_add(ALIGNMENT).filter(|_| length > 0).ok_or(failed(Errno::INVAL))?;
        // SAFETY: no address is given, so nothing that exists is mapped over.
        let reserved = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                whole,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(failed)?;
        let skip = reserved.addr().next_multiple_of(ALIGNMENT) - reserved.addr();
        // The reservation is trimmed to the pages that will be used; `edge` rounds up what comes behind them.
        let page = rustix::param::page_size();
        let edge = (skip + length).next_multiple_of(if flags.contains(MapFlags::HUGETLB) {
            ALIGNMENT
        } else {
            page
        });
        let base = reserved.wrapping_byte_add(skip);
        let flags = flags | MapFlags::FIXED;
        let mapped = match file {
            // SAFETY: the range lies inside the reservation, which is ours and unused.
            Some((file, offset)) => unsafe {
                rustix::mm::mmap(base, length, protection, flags, file, offset)
            },
            // SAFETY: as above.
            None => unsafe { rustix::mm::mmap_anonymous(base, length, protection, flags) },
        };
        if let Err(errno) = mapped {
            // SAFETY: the whole reservation is ours and nothing points into it.
            let _ = unsafe { rustix::mm::munmap(reserved, whole) };
            return Err(failed(errno));
        }
        if skip > 0 {
            // SAFETY: the part of the reservation before the mapping; nothing points into it.
            let _ = unsafe { rustix::mm::munmap(reserved, skip) };
        }
        if edge < whole {
            // SAFETY: the part of the reservation behind the mapping; nothing points into it.
            let _ = unsafe { rustix::mm::munmap(reserved.wrapping_byte_add(edge), whole - edge) };
        }
        Ok(Self { base: base.cast(), length })
    }

    /// Where it begins, in this process.
    pub fn address(&self) -> u64 {
        self.base.addr() as u64
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Never: a mapping has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The pointer to `offset`, after a check that `length` bytes follow it.
    ///
    /// # Panics
    /// If they do not: the caller's arithmetic is wrong, and going on would touch foreign memory.
    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(
            offset.checked_add(length).is_some_and(|end| end <= self.length),
            "{offset:#x}+{length:#x} is outside a mapping of {:#x} bytes",
            self.length
        );
        self.base.wrapping_add(offset)
    }

    /// A part of it, for the kernel alone to copy from.
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn window(&self, offset: usize, length: usize) -> Window<'_> {
        Window { start: self.at(offset, length), length, mapped: false, mapping: PhantomData }
    }

    /// Copies out. May wait for a page, where the memory is registered with a userfaultfd.
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: `from` is valid for the length (checked), and cannot overlap a Rust slice, which is never part of a mapping.
        // Others may write at the same time; then single bytes may be old or new, which is what a reader of a live guest gets.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies in.
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        // SAFETY: as in `read`.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// The word at `offset`, atomically.
    ///
    /// # Panics
    /// If `offset` is outside the mapping or no multiple of 8.
    pub fn load(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// Stores a word at `offset`, atomically.
    ///
    /// # Panics
    /// As [`load`](Self::load).
    pub fn store(&self, offset: usize, value: u64) {
        self.word(offset).store(value, Ordering::Release);
    }

    /// The word at `offset`: what two processes change at the same time.
    ///
    /// # Panics
    /// As [`load`](Self::load).
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "a word lies at a multiple of 8, not at {offset:#x}");
        let word: *mut u64 = self.at(offset, 8).cast();
        // SAFETY: valid for 8 bytes and aligned (checked; the base is aligned to 2 MiB), and lives as long as `self`.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// The first `count` bytes of it, each of which two processes change at the same time.
    ///
    /// # Panics
    /// If it has fewer.
    pub fn bytes(&self, count: usize) -> &[AtomicU8] {
        let first: *mut AtomicU8 = self.at(0, count).cast();
        // SAFETY: valid for `count` bytes (checked), for as long as `self` lives; an atomic byte is laid out as a byte is, and
        // whoever changes one meanwhile, here or elsewhere, is what atomics are for.
        unsafe { std::slice::from_raw_parts(first, count) }
    }

    /// madvise(MADV_DONTNEED): private memory reads as zero afterwards, shared memory as its file.
    ///
    /// # Errors
    /// The errno of madvise(2).
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn dont_need(&self, offset: usize, length: usize) -> Result<(), Errno> {
        self.advise(offset, length, Advice::LinuxDontNeed)
    }

    /// madvise(MADV_REMOVE): shared memory and its file read as zero afterwards, in every view.
    ///
    /// # Errors
    /// The errno of madvise(2).
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn remove(&self, offset: usize, length: usize) -> Result<(), Errno> {
        self.advise(offset, length, Advice::LinuxRemove)
    }

    /// madvise(MADV_HUGEPAGE) over all of it.
    ///
    /// # Errors
    /// The errno of madvise(2).
    pub fn prefer_huge(&self) -> Result<(), Errno> {
        self.advise(0, self.length, Advice::LinuxHugepage)
    }

    /// madvise(MADV_POPULATE_READ): every page of the range is mapped, read from its file where it is not in memory.
    ///
    /// # Errors
    /// The errno of madvise(2): EFAULT where the file has ended.
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn populate_read(&self, offset: usize, length: usize) -> Result<(), Errno> {
        self.advise(offset, length, Advice::LinuxPopulateRead)
    }

    /// madvise(MADV_RANDOM) over all of it: the kernel reads a page that is touched, and none ahead of it.
    ///
    /// # Errors
    /// The errno of madvise(2).
    pub fn read_nothing_ahead(&self) -> Result<(), Errno> {
        self.advise(0, self.length, Advice::Random)
    }

    /// mincore(2): for each page of the range, from a page's start on, whether it is in memory now. Of a file that is another
    /// user's and that this process may not write the kernel says that all is.
    ///
    /// # Errors
    /// The errno of mincore(2).
    ///
    /// # Panics
    /// If the range is outside the mapping.
    pub fn resident<'a>(&self, range: Range<usize>, into: &'a mut [u8]) -> Result<&'a [u8], Errno> {
        let start: *mut c_void = self.at(range.start, range.len()).cast();
        let into = &mut into[..range.len().div_ceil(rustix::param::page_size())];
        // SAFETY: the range is a part of the mapping (checked), and `into` has a byte for each page of it.
        let result = unsafe { libc::mincore(start, range.len(), into.as_mut_ptr()) };
        if result == 0 { Ok(into) } else { Err(last_errno()) }
    }

    fn advise(&self, offset: usize, length: usize, advice: Advice) -> Result<(), Errno> {
        let start: *mut c_void = self.at(offset, length).cast();
        // SAFETY: the range is ours (checked), and no reference into it exists that could see it change: only copies and
        // atomics reach it.
        unsafe { rustix::mm::madvise(start, length, advice) }
    }
}

/// Bytes of a mapping that only the kernel reads: what is not there (any more) is its EFAULT, never our SIGBUS.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    start: *const u8,
    length: usize,
    /// All of it was mapped a while ago: a hint.
    mapped: bool,
    mapping: PhantomData<&'a Mapping>,
}

impl Window<'_> {
    /// Where it begins, in this process.
    pub fn address(&self) -> u64 {
        self.start.addr() as u64
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The bytes of `range`, counted from its first.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.length,
            "{range:?} of a window of {:#x}",
            self.length
        );
        Self { start: self.start.wrapping_add(range.start), length: range.len(), ..*self }
    }

    /// Has the kernel copy all of it to where it can be looked at; see [`copy_heads_to`](Self::copy_heads_to).
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn copy_to(&self, into: &mut [u8]) -> Result<usize, Errno> {
        self.copy_heads_to(self.length, self.length, into)
    }

    /// Has the kernel copy the first `head` bytes of every `step` to where they can be looked at, one behind the other:
    /// process_vm_readv(2) of this process itself. Short where the window shows nothing any more. Returns how many bytes came, whole
    /// heads.
    ///
    /// # Errors
    /// The errno of process_vm_readv(2); EFAULT where the window does not even show its first byte. EPERM and ENOSYS: a sandbox
    /// forbids it.
    ///
    /// # Panics
    /// If `into` has not exactly the room.
    pub fn copy_heads_to(&self, step: usize, head: usize, into: &mut [u8]) -> Result<usize, Errno> {
        /// `UIO_MAXIOV` (`linux/uio.h`).
        const MOST: usize = 1024;
        let heads = self.length / step;
        assert!(head <= step && into.len() == heads * head, "{heads} heads into {} bytes", into.len());
        let me = rustix::process::getpid().as_raw_nonzero().get();
        let mut from = [const { libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 } }; MOST];
        let mut done = 0;
        while done < heads {
            let count = (heads - done).min(MOST);
            for (at, from) in from[..count].iter_mut().enumerate() {
                from.iov_base = self.start.wrapping_add((done + at) * step).cast_mut().cast();
                from.iov_len = head;
            }
            let room = &mut into[done * head..(done + count) * head];
            let to = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
            // SAFETY: `to` spans `room`, which is ours alone for the call. The window is only read, and by the kernel: it answers
            // EFAULT, and raises nothing, where there is no page.
            let copied = unsafe {
                libc::process_vm_readv(me, &raw const to, 1, from.as_ptr(), count as libc::c_ulong, 0)
            };
            let copied = match usize::try_from(copied) {
                Ok(copied) => copied / head,
                Err(_) if done > 0 => 0,
                Err(_) => return Err(last_errno()),
            };
            done += copied;
            if copied < count {
                break;
            }
        }
        Ok(done * head)
    }

    /// The same, for one that is known to have been mapped, as by [`map_in`](Self::map_in). Should that not be so any more, a copy
    /// from it takes longer, and no harm is done.
    #[must_use]
    pub fn known_mapped(self, mapped: bool) -> Self {
        Self { mapped, ..self }
    }

    /// Whether all of it was mapped a while ago.
    pub fn is_known_mapped(&self) -> bool {
        self.mapped
    }

    /// Has the kernel map all of it in one go, for whoever copies much from it: page by page that costs as much as the copy.
    /// Reads what is not in memory. Where the kernel cannot, the copy still can. What is known to be mapped is not walked again, which
    /// costs 50 ns a page.
    #[must_use]
    pub fn map_in(self) -> Self {
        if !self.mapped {
            let start: *mut c_void = self.start.cast_mut().cast();
            // SAFETY: the window lies in a mapping that outlives it, and mapping its pages changes nothing in them.
            let _ = unsafe { rustix::mm::madvise(start, self.length, Advice::LinuxPopulateRead) };
        }
        self.known_mapped(true)
    }

    /// Has the kernel write it into a file at `offset`. Short where the window shows nothing any more; the count is of bytes.
    ///
    /// # Errors
    /// The errno of pwrite(2); EFAULT where the window does not even show its first byte.
    pub fn write_to(&self, file: BorrowedFd<'_>, offset: u64) -> Result<usize, Errno> {
        let mut done = 0;
        while done < self.length {
            let from: *const c_void = self.start.wrapping_add(done).cast();
            // SAFETY: the window lies in a mapping that outlives it, which only the kernel reads here: it answers EFAULT, and
            // raises nothing, where there is no page.
            let written = unsafe {
                libc::pwrite(
                    file.as_raw_fd(),
                    from,
                    self.length - done,
                    (offset + done as u64) as libc::off_t,
                )
            };
            match usize::try_from(written) {
                Ok(0) => break,
                Ok(written) => done += written,
                Err(_) => match last_errno() {
                    Errno::INTR => {}
                    errno if done == 0 => return Err(errno),
                    _ => break,
                },
            }
        }
        Ok(done)
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing can reach it after this.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.length) };
    }
}
