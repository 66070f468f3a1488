//! The two sizes that a page of guest memory may have.

use std::fmt;

/// The unit in which a region's memory is faulted, installed and removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PageSize {
    /// 4 KiB: anonymous memory, files and memfds.
    Small,
    /// 2 MiB: hugetlbfs.
    Huge,
}

impl PageSize {
    /// Every size that there is.
    pub const ALL: [Self; 2] = [Self::Small, Self::Huge];

    /// The size in bytes: 4096 or 2,097,152.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// The size as a power of two: 12 or 21.
    pub const fn shift(self) -> u32 {
        match self {
            Self::Small => 12,
            Self::Huge => 21,
        }
    }

    /// The page size of that many bytes, or `None` where there is none.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            4096 => Some(Self::Small),
            0x20_0000 => Some(Self::Huge),
            _ => None,
        }
    }

    /// Whether `value` (an address, an offset or a size, in bytes) is a whole number of pages.
    pub const fn divides(self, value: u64) -> bool {
        value & (self.bytes() - 1) == 0
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Small => "4 KiB",
            Self::Huge => "2 MiB",
        })
    }
}
