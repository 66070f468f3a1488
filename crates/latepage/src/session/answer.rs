//! Parts of a source's answer, page by page.

use std::ops::Range;

use crate::source::Answer;

impl Answer<'_> {
    /// How many pages of `unit` bytes it covers.
    pub(super) fn pages(&self, unit: usize) -> u32 {
        let bytes = match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Zero(bytes) => *bytes,
            Self::Later => 0,
        };
        (bytes / unit as u64) as u32
    }

    /// The pages of `range`, counted from its first.
    pub(super) fn part(&self, range: Range<u32>, unit: usize) -> Self {
        match *self {
            Self::Bytes(bytes) => Self::Bytes(&bytes[range.start as usize * unit..range.end as usize * unit]),
            Self::Zero(_) => Self::Zero(u64::from(range.end - range.start) * unit as u64),
            Self::Later => Self::Later,
        }
    }
}
