//! Parts of a source's answer, page by page.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::source::{Answer, AtHand, Source, SourceError};

/// Why a source's answer is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// It cannot supply the contents, or vouch for them.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// It answered a length that no source may.
    #[error(
        "the source has a fault: it answered {answered} bytes where {asked} were asked for, in pages of {unit}"
    )]
    Length {
        /// Bytes that it answered.
        answered: u64,
        /// Bytes that it was asked for.
        asked: usize,
        /// Bytes of a page.
        unit: usize,
    },
    /// It did not wait.
    #[error("the source has a fault: it answered \"later\" where it was to wait")]
    Later,
}

/// As [`answered`], with the reason in words.
pub(super) fn checked<'a>(
    ask: impl FnOnce() -> Result<Answer<'a>, SourceError>,
    asked: usize,
    unit: usize,
    may_be_later: bool,
) -> Result<Answer<'a>, String> {
    answered(ask, asked, unit, may_be_later).map_err(|why| why.to_string())
}

/// What a source answers when `ask` asks it, if a source may answer that: whole pages, one at least, no more than were asked for.
///
/// A source may be anybody's. One that breaks its promise, or panics, fails its own page, and takes no thread of ours with it.
pub(super) fn answered<'a>(
    ask: impl FnOnce() -> Result<Answer<'a>, SourceError>,
    asked: usize,
    unit: usize,
    may_be_later: bool,
) -> Result<Answer<'a>, NoAnswer> {
    // What it leaves behind in the scratch is not looked at, and what it leaves behind in itself is its own affair.
    let answer = catch_unwind(AssertUnwindSafe(ask))
        .unwrap_or_else(|panic| Err(SourceError::Panicked { message: message_of(&*panic) }))?;
    let covered = match answer {
        Answer::Bytes(bytes) => bytes.len() as u64,
        Answer::Zero(bytes) => bytes,
        Answer::Later if may_be_later => return Ok(answer),
        Answer::Later => return Err(NoAnswer::Later),
    };
    if covered == 0 || covered > asked as u64 || !covered.is_multiple_of(unit as u64) {
        return Err(NoAnswer::Length { answered: covered, asked, unit });
    }
    Ok(answer)
}

/// What a source has in its windows, if a source may answer that; anything else counts as nothing, and it is asked.
pub(super) fn at_hand(source: &dyn Source, offset: u64, length: usize, unit: usize) -> Option<AtHand<'_>> {
    let found = catch_unwind(AssertUnwindSafe(|| source.at_hand(offset, length, unit))).ok()??;
    let covered = match found {
        AtHand::Contents(window) => window.len() as u64,
        AtHand::Zero(bytes) => bytes,
    };
    (covered > 0 && covered <= length as u64 && covered.is_multiple_of(unit as u64)).then_some(found)
}

/// Whether what was copied from a source's windows can be believed; a source that panics does not say so.
pub(super) fn vouched(source: &dyn Source) -> Result<(), SourceError> {
    catch_unwind(AssertUnwindSafe(|| source.vouch()))
        .unwrap_or_else(|panic| Err(SourceError::Panicked { message: message_of(&*panic) }))
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref().map(String::as_str));
    text.unwrap_or("without a word").to_owned()
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
