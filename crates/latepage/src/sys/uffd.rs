//! userfaultfd: faults of another process's memory, and the calls that resolve them.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use bitflags::bitflags;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use super::mapping::Window;
use super::uffd_abi as abi;

bitflags! {
    /// UFFD_FEATURE_*: what UFFDIO_API may switch on. The Linux version that brought each stands beside it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Write-protect faults (5.7).
        const PAGEFAULT_FLAG_WP = 1 << 0;
        /// A message at fork(2) (4.11).
        const EVENT_FORK = 1 << 1;
        /// A message at mremap(2) (4.11).
        const EVENT_REMAP = 1 << 2;
        /// A message at madvise(MADV_DONTNEED or MADV_REMOVE) (4.11).
        const EVENT_REMOVE = 1 << 3;
        /// Missing faults on hugetlbfs (4.11).
        const MISSING_HUGETLBFS = 1 << 4;
        /// Missing faults on shared memory (4.11).
        const MISSING_SHMEM = 1 << 5;
        /// A message at munmap(2) (4.11).
        const EVENT_UNMAP = 1 << 6;
        /// SIGBUS to the faulting thread instead of a message (4.14).
        const SIGBUS = 1 << 7;
        /// The faulting thread's id in the message (4.14).
        const THREAD_ID = 1 << 8;
        /// Minor faults on hugetlbfs (5.13).
        const MINOR_HUGETLBFS = 1 << 9;
        /// Minor faults on shared memory (5.14).
        const MINOR_SHMEM = 1 << 10;
        /// The address to the byte instead of to the page (5.18).
        const EXACT_ADDRESS = 1 << 11;
        /// Write-protection of hugetlbfs and shared memory (5.19).
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Write-protection of pages that are not there yet (6.4).
        const WP_UNPOPULATED = 1 << 13;
        /// UFFDIO_POISON (6.6).
        const POISON = 1 << 14;
        /// Write-protect faults that the kernel resolves itself (6.7).
        const WP_ASYNC = 1 << 15;
        /// UFFDIO_MOVE (6.8).
        const MOVE = 1 << 16;
    }

    /// Which faults a range reports: UFFDIO_REGISTER_MODE_*.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RegisterMode: u64 {
        /// No page there.
        const MISSING = 1 << 0;
        /// A write to a protected page.
        const WP = 1 << 1;
        /// A page in the page cache that is not mapped yet.
        const MINOR = 1 << 2;
    }

    /// The calls that the kernel offers for a registered range: `1 << number`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Ioctls: u64 {
        /// UFFDIO_WAKE.
        const WAKE = 1 << 0x02;
        /// UFFDIO_COPY.
        const COPY = 1 << 0x03;
        /// UFFDIO_ZEROPAGE.
        const ZEROPAGE = 1 << 0x04;
        /// UFFDIO_MOVE.
        const MOVE = 1 << 0x05;
        /// UFFDIO_WRITEPROTECT.
        const WRITEPROTECT = 1 << 0x06;
        /// UFFDIO_CONTINUE.
        const CONTINUE = 1 << 0x07;
        /// UFFDIO_POISON.
        const POISON = 1 << 0x08;
    }

    /// What a page-fault message says of the access: UFFD_PAGEFAULT_FLAG_*.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct FaultFlags: u64 {
        /// It was a write.
        const WRITE = 1 << 0;
        /// It was a write to a protected page.
        const WP = 1 << 1;
        /// The page is in the page cache, not in the page table.
        const MINOR = 1 << 2;
    }

    /// How COPY, ZEROPAGE, CONTINUE and POISON are done.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct InstallMode: u64 {
        /// Leave those who wait asleep: a later WAKE is owed.
        const DONTWAKE = 1 << 0;
        /// Map it write-protected (COPY and CONTINUE only).
        const WP = 1 << 1;
    }
}

/// A call on a userfaultfd failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} at {address:#x} (+{length:#x}): {errno}")]
pub struct UffdError {
    /// The call: `UFFDIO_REGISTER` and so on.
    pub call: &'static str,
    /// Where it began, as an address in the memory's owner.
    pub address: u64,
    /// How long the range was, in bytes.
    pub length: u64,
    /// What the kernel said.
    pub errno: Errno,
}

/// A userfaultfd could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Neither way is open to this process.
    #[error(
        "no right to a userfaultfd: {} is not open to this process ({device}), and userfaultfd(2) wants CAP_SYS_PTRACE \
         ({syscall}); grant it with: setfacl -m u:USER:rw {}",
        Userfaultfd::DEVICE,
        Userfaultfd::DEVICE
    )]
    NotAllowed {
        /// What opening the device said.
        device: Errno,
        /// What the system call said.
        syscall: Errno,
    },
    /// There is no room for another descriptor, in this process or on this machine.
    #[error("no room for another userfaultfd: {}", want_of_room(*errno, *allowed))]
    NoRoom {
        /// EMFILE of the process, ENFILE of the machine.
        errno: Errno,
        /// How many descriptors this process may have; `None` for any number.
        allowed: Option<u64>,
    },
    /// The kernel has it, but not all that was asked for.
    #[error("this kernel's userfaultfd lacks {missing:?} (it offers {offered:?})")]
    Lacks {
        /// What was asked for and is not there.
        missing: Features,
        /// What there is.
        offered: Features,
    },
    /// UFFDIO_API failed in some other way.
    #[error("UFFDIO_API: {0}")]
    Api(Errno),
}

/// How far an installing call came.
///
/// The kernel may stop part of the way: then `bytes` are in (and, unless DONTWAKE was given, those who waited for them were
/// woken), and `stopped` says what it met at `bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Installed {
    /// Bytes installed from the start of the range.
    pub bytes: u64,
    /// What stopped it, if it did not reach the end.
    pub stopped: Option<Errno>,
}

/// One message from a userfaultfd. Addresses are those of the memory's owner.
#[derive(Debug)]
pub enum Message {
    /// Someone waits for a page.
    PageFault {
        /// Where; rounded down to the page unless EXACT_ADDRESS is on.
        address: u64,
        /// How.
        flags: FaultFlags,
        /// Which thread, where THREAD_ID is on; else 0.
        thread: u32,
    },
    /// The range was discarded; its owner goes on as soon as this has been read.
    Remove {
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// The range was unmapped.
    Unmap {
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// The range was moved.
    Remap {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// The owner forked; this is a userfaultfd over the child's memory.
    Fork(OwnedFd),
    /// A message that this version does not know.
    Unknown(u8),
}

/// A buffer for messages, allocated once: a read(2) into bad memory would lose what it read.
pub struct MessageBuffer {
    raw: Box<[abi::Msg]>,
    filled: usize,
}

impl MessageBuffer {
    /// Room for `messages` at a time.
    pub fn new(messages: usize) -> Self {
        Self { raw: vec![abi::Msg::default(); messages.max(1)].into_boxed_slice(), filled: 0 }
    }

    /// Whether the last read filled it, so that more may be waiting.
    pub fn is_full(&self) -> bool {
        self.filled == self.raw.len()
    }

    /// The messages of the last read, in the kernel's order; each is given once.
    pub fn drain(&mut self) -> impl Iterator<Item = Message> + '_ {
        let filled = std::mem::take(&mut self.filled);
        self.raw[..filled].iter().map(|raw| {
            let [a, b, c] = raw.argument;
            match raw.event {
                abi::EVENT_PAGEFAULT => Message::PageFault {
                    address: b,
                    flags: FaultFlags::from_bits_truncate(a),
                    thread: c as u32,
                },
                abi::EVENT_REMOVE => Message::Remove { start: a, end: b },
                abi::EVENT_UNMAP => Message::Unmap { start: a, end: b },
                abi::EVENT_REMAP => Message::Remap { from: a, to: b, length: c },
                // SAFETY: read(2) installed this descriptor for us, and a message is handed out once.
                abi::EVENT_FORK => Message::Fork(unsafe { OwnedFd::from_raw_fd(a as u32 as RawFd) }),
                other => Message::Unknown(other),
            }
        })
    }
}

/// What has become of the memory behind a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnersMemory {
    /// It exists.
    There,
    /// It exists, and a thread of its owner is in the middle of a discard, fork, move or unmapping: its event is unread, or
    /// will come, or has been read and the thread has not run since.
    Changing,
    /// Its owner has ended, or there never was any.
    Gone,
}

/// A userfaultfd: ours, or one that another process sent. Its calls act on the memory of whoever made it.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
}

impl Userfaultfd {
    /// The device that makes one, by its own permissions (Linux 6.1 and later).
    pub const DEVICE: &'static str = "/dev/userfaultfd";

    /// Makes one over this process's memory, with `features` switched on, for faults in the kernel too (KVM's are).
    ///
    /// It is non-blocking, since a blocking one cannot be polled, and close-on-exec.
    ///
    /// # Errors
    /// [`CreateError`]: no right to one, or the kernel lacks a feature.
    pub fn create(features: Features) -> Result<Self, CreateError> {
        // UFFDIO_API can be done once on a descriptor, so what there is gets asked on one that is thrown away.
        let offered = Self::offered()?;
        if !offered.contains(features) {
            return Err(CreateError::Lacks { missing: features - offered, offered });
        }
        let made = Self::open()?;
        made.api(features)?;
        Ok(made)
    }

    /// All features that this kernel offers to this process.
    ///
    /// # Errors
    /// [`CreateError`]: no right to a userfaultfd at all.
    pub fn offered() -> Result<Features, CreateError> {
        Self::open()?.api(Features::empty())
    }

    /// Takes a descriptor that another process sent.
    ///
    /// # Errors
    /// The descriptor back, if it is no userfaultfd.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, OwnedFd> {
        match fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
            Ok(link) if link == Path::new("anon_inode:[userfaultfd]") => Ok(Self { fd }),
            _ => Err(fd),
        }
    }

    fn open() -> Result<Self, CreateError> {
        let device = match Self::open_by_device() {
            Ok(made) => return Ok(made),
            Err(errno) => errno,
        };
        Self::open_by_syscall().map_err(|syscall| {
            // Both take a descriptor, and either may be forbidden as well.
            match [device, syscall].into_iter().find(|errno| [Errno::MFILE, Errno::NFILE].contains(errno)) {
                Some(errno) => CreateError::NoRoom { errno, allowed: getrlimit(Resource::Nofile).current },
                None => CreateError::NotAllowed { device, syscall },
            }
        })
    }

    /// By the device alone: the grant that an administrator can give to one user.
    ///
    /// # Errors
    /// What opening the device, or its ioctl, said.
    pub fn open_by_device() -> Result<Self, Errno> {
        use rustix::fs::{Mode, OFlags};
        let device = rustix::fs::open(Self::DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        // SAFETY: USERFAULTFD_IOC_NEW takes its flags by value and no pointer.
        let made = unsafe {
            libc::ioctl(device.as_raw_fd(), abi::USERFAULTFD_IOC_NEW as _, libc::O_CLOEXEC | libc::O_NONBLOCK)
        };
        Self::from_new(made as libc::c_long)
    }

    /// By userfaultfd(2) alone: needs CAP_SYS_PTRACE or `vm.unprivileged_userfaultfd=1`.
    ///
    /// # Errors
    /// What the system call said.
    pub fn open_by_syscall() -> Result<Self, Errno> {
        // SAFETY: userfaultfd(2) takes its flags by value and no pointer.
        let made = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        Self::from_new(made)
    }

    /// Makes one for faults of user space alone, which every process may have (Linux 5.11): it cannot serve KVM, but tells what
    /// the kernel offers and tries it.
    ///
    /// # Errors
    /// What userfaultfd(2) said, or UFFDIO_API (EINVAL where the kernel lacks a feature).
    pub fn create_for_user_space(features: Features) -> Result<Self, Errno> {
        let made = Self::open_for_user_space()?;
        made.api(features).map_err(api_errno)?;
        Ok(made)
    }

    /// The features that this kernel offers, asked by a userfaultfd for user space alone.
    ///
    /// # Errors
    /// What userfaultfd(2) said.
    pub fn offered_to_user_space() -> Result<Features, Errno> {
        Self::open_for_user_space()?.api(Features::empty()).map_err(api_errno)
    }

    fn open_for_user_space() -> Result<Self, Errno> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | abi::UFFD_USER_MODE_ONLY;
        // SAFETY: userfaultfd(2) takes its flags by value and no pointer.
        Self::from_new(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })
    }

    fn from_new(made: libc::c_long) -> Result<Self, Errno> {
        if made < 0 {
            return Err(last_errno());
        }
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(made as RawFd) };
        Ok(Self { fd })
    }

    fn api(&self, features: Features) -> Result<Features, CreateError> {
        let mut api = abi::Api { api: abi::UFFD_API, features: features.bits(), ioctls: 0 };
        self.call(abi::UFFDIO_API, &mut api).map_err(CreateError::Api)?;
        Ok(Features::from_bits_truncate(api.features))
    }

    /// `request` must be the number that goes with `T`; all callers are in this file and pass pairs from `abi`.
    fn call<T>(&self, request: u64, argument: &mut T) -> Result<(), Errno> {
        let pointer: *mut T = argument;
        // SAFETY: `pointer` is a live, exclusive `repr(C)` structure of the size that `request` carries (asserted in
        // `uffd_abi`); the kernel keeps it no longer than the call.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request as _, pointer) };
        if result < 0 { Err(last_errno()) } else { Ok(()) }
    }

    /// Has a range of the owner's memory report its faults here, and returns the calls that resolve them.
    ///
    /// Whoever holds the descriptor may call it again to add a mode.
    ///
    /// # Errors
    /// [`UffdError`] with EINVAL where the range is not mapped, not page-aligned, or of a kind that cannot be registered.
    pub fn register(&self, start: u64, length: u64, mode: RegisterMode) -> Result<Ioctls, UffdError> {
        let mut register =
            abi::Register { range: abi::Range { start, len: length }, mode: mode.bits(), ioctls: 0 };
        self.call(abi::UFFDIO_REGISTER, &mut register).map_err(|errno| UffdError {
            call: "UFFDIO_REGISTER",
            address: start,
            length,
            errno,
        })?;
        Ok(Ioctls::from_bits_truncate(register.ioctls))
    }

    /// Ends reporting for a range; those who wait in it are woken, and absent pages are from then on the kernel's own.
    ///
    /// # Errors
    /// [`UffdError`].
    pub fn unregister(&self, start: u64, length: u64) -> Result<(), UffdError> {
        self.ranged("UFFDIO_UNREGISTER", abi::UFFDIO_UNREGISTER, start, length)
    }

    /// Wakes everyone who waits for a page in the range; they try again.
    ///
    /// # Errors
    /// [`UffdError`].
    pub fn wake(&self, start: u64, length: u64) -> Result<(), UffdError> {
        self.ranged("UFFDIO_WAKE", abi::UFFDIO_WAKE, start, length)
    }

    fn ranged(&self, call: &'static str, request: u64, start: u64, length: u64) -> Result<(), UffdError> {
        let mut range = abi::Range { start, len: length };
        self.call(request, &mut range).map_err(|errno| UffdError { call, address: start, length, errno })
    }

    /// Puts a copy of `contents` at `start`, where no page is yet, and wakes who waits for it.
    pub fn copy(&self, start: u64, contents: &[u8], mode: InstallMode) -> Installed {
        self.copy_from(start, contents.as_ptr() as u64, contents.len() as u64, mode)
    }

    /// Puts a copy of what a window shows at `start`, as [`copy`](Self::copy) does; EFAULT where the window shows nothing.
    pub fn copy_window(&self, start: u64, contents: Window<'_>, mode: InstallMode) -> Installed {
        self.copy_from(start, contents.address(), contents.len() as u64, mode)
    }

    /// The kernel reads the source as this process would, and says EFAULT where there is nothing.
    fn copy_from(&self, start: u64, source: u64, length: u64, mode: InstallMode) -> Installed {
        let mut copy = abi::Copy { dst: start, src: source, len: length, mode: mode.bits(), copy: 0 };
        let result = self.call(abi::UFFDIO_COPY, &mut copy);
        Installed::from_call(result, copy.copy, length)
    }

    /// Puts zero pages into the range; not for hugetlbfs (EINVAL).
    pub fn zeropage(&self, start: u64, length: u64, mode: InstallMode) -> Installed {
        self.install(abi::UFFDIO_ZEROPAGE, start, length, mode)
    }

    /// Maps the page-cache pages that back the range (filled before through another mapping of the same file).
    pub fn continue_(&self, start: u64, length: u64, mode: InstallMode) -> Installed {
        self.install(abi::UFFDIO_CONTINUE, start, length, mode)
    }

    /// Makes every access to the range a SIGBUS (Linux 6.6 and later).
    pub fn poison(&self, start: u64, length: u64, mode: InstallMode) -> Installed {
        self.install(abi::UFFDIO_POISON, start, length, mode)
    }

    fn install(&self, request: u64, start: u64, length: u64, mode: InstallMode) -> Installed {
        let mut ranged = abi::Ranged { range: abi::Range { start, len: length }, mode: mode.bits(), done: 0 };
        let result = self.call(request, &mut ranged);
        Installed::from_call(result, ranged.done, length)
    }

    /// Moves pages of the owner's memory from `source` to `start` (Linux 6.8 and later, anonymous memory).
    pub fn move_(&self, start: u64, source: u64, length: u64, mode: InstallMode) -> Installed {
        let mut moving = abi::Move { dst: start, src: source, len: length, mode: mode.bits(), moved: 0 };
        let result = self.call(abi::UFFDIO_MOVE, &mut moving);
        Installed::from_call(result, moving.moved, length)
    }

    /// Protects the range against writes, or lets them through again and wakes who waits.
    ///
    /// # Errors
    /// [`UffdError`]; EINVAL where the range is not registered for it.
    pub fn write_protect(&self, start: u64, length: u64, protect: bool) -> Result<(), UffdError> {
        let mut argument =
            abi::WriteProtect { range: abi::Range { start, len: length }, mode: u64::from(protect) };
        self.call(abi::UFFDIO_WRITEPROTECT, &mut argument).map_err(|errno| UffdError {
            call: "UFFDIO_WRITEPROTECT",
            address: start,
            length,
            errno,
        })
    }

    /// Reads as many messages as wait and fit, and returns how many: none where none wait.
    ///
    /// # Errors
    /// The errno of read(2); EAGAIN and EINTR are no errors, but "none".
    pub fn read(&self, buffer: &mut MessageBuffer) -> Result<usize, Errno> {
        buffer.filled = 0;
        let mut read = self.read_messages(&mut buffer.raw, libc::RWF_NOWAIT);
        if read == Err(Errno::OPNOTSUPP) {
            // Kernels whose userfaultfd has no read_iter.
            read = self.read_messages(&mut buffer.raw, 0);
        }
        let read = match read {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(0),
            read => read?,
        };
        buffer.filled = read / size_of::<abi::Msg>();
        Ok(buffer.filled)
    }

    /// With RWF_NOWAIT: O_NONBLOCK belongs to the open file, which the sender of the descriptor shares and may change.
    fn read_messages(&self, into: &mut [abi::Msg], flags: libc::c_int) -> Result<usize, Errno> {
        let room = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: size_of_val(into) };
        // Not by glibc's wrapper: preadv2 is a point of cancellation there, which two atomic steps a call guard in a process of several
        // threads, and nobody cancels ours.
        // SAFETY: `room` spans `into`, which is ours alone for the call, and any bit pattern is a valid `Msg`. Offset -1, in two halves
        // of a register each, reads as read(2) does.
        let read = unsafe {
            libc::syscall(
                libc::SYS_preadv2,
                self.fd.as_raw_fd(),
                &raw const room,
                1_usize,
                -1_isize,
                -1_isize,
                flags,
            )
        };
        usize::try_from(read).map_err(|_| last_errno())
    }

    /// Whether the memory behind it still exists. Nothing is changed by asking.
    pub fn has_memory(&self) -> bool {
        self.memory() != OwnersMemory::Gone
    }

    /// Whether polling it says so: UFFDIO_API was never done on it, or it blocks. No fault can be waited for then.
    pub(crate) fn polls_an_error(&self) -> bool {
        Self::descriptor_polls_an_error(self.as_fd())
    }

    /// The same, of a userfaultfd that is only looked at.
    pub(crate) fn descriptor_polls_an_error(descriptor: BorrowedFd<'_>) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec};
        let mut polled = [PollFd::from_borrowed_fd(descriptor, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::ERR)
    }

    /// What has become of the memory behind it. Nothing is changed by asking.
    ///
    /// The kernel tells a discard that is under way (EAGAIN), then a dead owner (ESRCH), before it looks at the range, and a
    /// range that nobody can have registered (ENOENT) only after them.
    pub fn memory(&self) -> OwnersMemory {
        // Nobody has guest memory there. Below vm.mmap_min_addr, 64 KiB as a rule, older kernels say EINVAL before all else.
        const NOBODYS_PAGE: u64 = 1 << 20;
        const { assert!(NOBODYS_PAGE >= 64 << 10) };
        static PAGE: [u8; 4096] = [0; 4096];
        let probe = self.copy(NOBODYS_PAGE, &PAGE, InstallMode::DONTWAKE);
        match probe.stopped {
            Some(Errno::SRCH) => OwnersMemory::Gone,
            // UFFDIO_API was never done, so that no range can be registered: then, and only then, it also polls an error.
            Some(Errno::INVAL) if self.polls_an_error() => OwnersMemory::Gone,
            Some(Errno::AGAIN) => OwnersMemory::Changing,
            _ => OwnersMemory::There,
        }
    }
}

impl Installed {
    /// `done` is what the kernel wrote back: the bytes that are in, or a negative errno. The call returns EAGAIN for
    /// either kind of stop, so the page at which it stopped is asked about again by the caller.
    fn from_call(result: Result<(), Errno>, done: i64, length: u64) -> Self {
        match result {
            Ok(()) => Self { bytes: length, stopped: None },
            Err(errno) => Self { bytes: u64::try_from(done).unwrap_or(0), stopped: Some(errno) },
        }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Userfaultfd> for OwnedFd {
    fn from(uffd: Userfaultfd) -> Self {
        uffd.fd
    }
}

/// Whose limit it is, and how it is raised.
fn want_of_room(errno: Errno, allowed: Option<u64>) -> String {
    match allowed.filter(|_| errno == Errno::MFILE) {
        Some(allowed) => format!(
            "this process may have {allowed} descriptors, and has them; allow it more: ulimit -n (systemd: LimitNOFILE=)"
        ),
        None => format!("{errno}; this machine has as many files open as it may: sysctl fs.file-max"),
    }
}

fn api_errno(error: CreateError) -> Errno {
    match error {
        CreateError::Api(errno) => errno,
        _ => Errno::INVAL,
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}
