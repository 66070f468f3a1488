//! The userfaultfd ABI: ioctl numbers, structures and bits of `linux/userfaultfd.h`, as of Linux 6.8 (UFFDIO_MOVE).
//!
//! Written out rather than computed, so that a reader can compare them with `strace`; each is asserted against the formula.

/// The API version that UFFDIO_API wants.
pub(super) const UFFD_API: u64 = 0xAA;

pub(super) const UFFDIO_API: u64 = 0xC018_AA3F;
pub(super) const UFFDIO_REGISTER: u64 = 0xC020_AA00;
pub(super) const UFFDIO_UNREGISTER: u64 = 0x8010_AA01;
pub(super) const UFFDIO_WAKE: u64 = 0x8010_AA02;
pub(super) const UFFDIO_COPY: u64 = 0xC028_AA03;
pub(super) const UFFDIO_ZEROPAGE: u64 = 0xC020_AA04;
pub(super) const UFFDIO_MOVE: u64 = 0xC028_AA05;
pub(super) const UFFDIO_WRITEPROTECT: u64 = 0xC018_AA06;
pub(super) const UFFDIO_CONTINUE: u64 = 0xC020_AA07;
pub(super) const UFFDIO_POISON: u64 = 0xC020_AA08;
/// A flag of userfaultfd(2): no faults that the kernel takes.
pub(super) const UFFD_USER_MODE_ONLY: libc::c_int = 1;
/// On `/dev/userfaultfd` (Linux 6.1 and later): makes a new userfaultfd.
pub(super) const USERFAULTFD_IOC_NEW: u64 = 0x0000_AA00;

pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
pub(super) const EVENT_FORK: u8 = 0x13;
pub(super) const EVENT_REMAP: u8 = 0x14;
pub(super) const EVENT_REMOVE: u8 = 0x15;
pub(super) const EVENT_UNMAP: u8 = 0x16;

#[repr(C)]
pub(super) struct Api {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) len: u64,
}

#[repr(C)]
pub(super) struct Register {
    pub(super) range: Range,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
pub(super) struct Copy {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) copy: i64,
}

/// The shape that ZEROPAGE, CONTINUE and POISON share: a range, a mode, and how far the kernel came.
#[repr(C)]
pub(super) struct Ranged {
    pub(super) range: Range,
    pub(super) mode: u64,
    pub(super) done: i64,
}

#[repr(C)]
pub(super) struct Move {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) moved: i64,
}

#[repr(C)]
pub(super) struct WriteProtect {
    pub(super) range: Range,
    pub(super) mode: u64,
}

/// One message as read(2) gives it: `struct uffd_msg`, 32 bytes.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Msg {
    pub(super) event: u8,
    pub(super) reserved1: u8,
    pub(super) reserved2: u16,
    pub(super) reserved3: u32,
    /// PAGEFAULT: flags, address, thread id. FORK: descriptor. REMAP: from, to, length. REMOVE and UNMAP: start, end.
    pub(super) argument: [u64; 3],
}

const fn ioctl(direction: u64, number: u64, size: usize) -> u64 {
    (direction << 30) | ((size as u64) << 16) | (0xAA << 8) | number
}
const NONE: u64 = 0;
const READ: u64 = 2;
const BOTH: u64 = 3;

const _: () = {
    assert!(UFFDIO_API == ioctl(BOTH, 0x3F, size_of::<Api>()));
    assert!(UFFDIO_REGISTER == ioctl(BOTH, 0x00, size_of::<Register>()));
    assert!(UFFDIO_UNREGISTER == ioctl(READ, 0x01, size_of::<Range>()));
    assert!(UFFDIO_WAKE == ioctl(READ, 0x02, size_of::<Range>()));
    assert!(UFFDIO_COPY == ioctl(BOTH, 0x03, size_of::<Copy>()));
    assert!(UFFDIO_ZEROPAGE == ioctl(BOTH, 0x04, size_of::<Ranged>()));
    assert!(UFFDIO_MOVE == ioctl(BOTH, 0x05, size_of::<Move>()));
    assert!(UFFDIO_WRITEPROTECT == ioctl(BOTH, 0x06, size_of::<WriteProtect>()));
    assert!(UFFDIO_CONTINUE == ioctl(BOTH, 0x07, size_of::<Ranged>()));
    assert!(UFFDIO_POISON == ioctl(BOTH, 0x08, size_of::<Ranged>()));
    assert!(USERFAULTFD_IOC_NEW == ioctl(NONE, 0x00, 0));
    assert!(size_of::<Msg>() == 32);
};
