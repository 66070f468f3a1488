//! Parts of a source's answer, page by page.

use std::ops::Range;

use crate::source::{Answer, SourceError};

/// What a source answered, if a source may answer that: whole pages, one at least, no more than were asked for.
///
/// A source may be anybody's. One that breaks its promise fails its own page, and takes no thread of ours with it.
pub(super) fn checked(
    answered: Result<Answer<'_>, SourceError>,
    asked: usize,
    unit: usize,
    may_be_later: bool,
) -> Result<Answer<'_>, String> {
    let answer = answered.map_err(|error| error.to_string())?;
    let covered = match answer {
        Answer::Bytes(bytes) => bytes.len() as u64,
        Answer::Zero(bytes) => bytes,
        Answer::Later if may_be_later => return Ok(answer),
        Answer::Later => {
            return Err("the source has a fault: it answered \"later\" where it was to wait".to_owned());
        }
    };
    if covered == 0 || covered > asked as u64 || !covered.is_multiple_of(unit as u64) {
        return Err(format!(
            "the source has a fault: it answered {covered} bytes where {asked} were asked for, in pages of {unit}"
        ));
    }
    Ok(answer)
}

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
