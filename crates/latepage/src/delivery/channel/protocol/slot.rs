//! What the words of a slot mean.

use std::ops::Range;

use super::layout::Shape;

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Nothing: its owner may post.
    Free = 0,
    /// Its owner waits, and no reader has seen it.
    Posted = 1,
    /// Its owner waits, and the reader of a generation has it.
    Taken = 2,
    /// It was completed: its owner may look, and post again.
    Done = 3,
}

/// The state of a slot: one word, changed by single atomic steps. The low half is what its owner sleeps on.
///
/// | bits | |
/// |---|---|
/// | 0 and 1 | [`Kind`] |
/// | 2 to 31 | the post's number, which tells it from the ones before |
/// | 32 to 63 | the generation of the reader that has taken it |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State(pub(super) u64);

impl State {
    pub(super) fn new(kind: Kind, number: u32, generation: u32) -> Self {
        let low = kind as u32 | number << 2;
        Self(u64::from(low) | u64::from(generation) << 32)
    }

    pub(super) fn kind(self) -> Kind {
        match self.0 & 3 {
            0 => Kind::Free,
            1 => Kind::Posted,
            2 => Kind::Taken,
            _ => Kind::Done,
        }
    }

    pub(super) fn number(self) -> u32 {
        self.low() >> 2
    }

    pub(super) fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub(super) fn low(self) -> u32 {
        self.0 as u32
    }

    pub(super) fn waits(self) -> bool {
        matches!(self.kind(), Kind::Posted | Kind::Taken)
    }

    /// The number of the post after `number`.
    pub(super) fn after(number: u32) -> u32 {
        number.wrapping_add(1) & (u32::MAX >> 2)
    }
}

/// What a thread of the VMM asks of the reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// A page, to which it needs access.
    Fault {
        /// By its index in the session.
        page: u32,
        /// Whether it was a write, where the trap tells.
        write: bool,
        /// The thread, as gettid(2) has it; 0 where that is not told.
        thread: u32,
    },
    /// It is about to discard these pages, and does so once it has the answer: from then on they are never the snapshot's again.
    Removed(Range<u32>),
}

const FAULT: u32 = 1;
const REMOVED: u32 = 2;
const WRITE: u32 = 1 << 8;

impl Request {
    /// The two words of it: which pages, and how.
    pub(super) fn words(&self) -> [u64; 2] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        match self {
            Self::Fault { page, write, thread } => {
                [pair(*page, 1), pair(FAULT | if *write { WRITE } else { 0 }, *thread)]
            }
            Self::Removed(pages) => {
                [pair(pages.start, pages.end.saturating_sub(pages.start)), pair(REMOVED, 0)]
            }
        }
    }

    /// What a stranger wrote there, if it is a request for pages of this channel.
    pub(super) fn read([asked, how]: [u64; 2], shape: Shape) -> Option<Self> {
        let pages = shape.pages_of(asked as u32, (asked >> 32) as u32)?;
        match how as u32 {
            kind if kind & !WRITE == FAULT && pages.len() == 1 => {
                Some(Self::Fault { page: pages.start, write: kind & WRITE != 0, thread: (how >> 32) as u32 })
            }
            REMOVED => Some(Self::Removed(pages)),
            _ => None,
        }
    }

    /// The pages that it is about.
    pub fn pages(&self) -> Range<u32> {
        match self {
            Self::Fault { page, .. } => *page..page.saturating_add(1),
            Self::Removed(pages) => pages.clone(),
        }
    }
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completion {
    /// These pages have been seen to, those that were asked for among them: filled where that was asked, and what the reader can
    /// do to expose them has been done.
    Done(Range<u32>),
    /// The page cannot be had. Whoever touches it must not go on as if it were there.
    Failed,
    /// The request made no sense to the reader: no such page, or nothing that it knows.
    Refused,
}

const DONE: u64 = 1;
const FAILED: u64 = 2;
const REFUSED: u64 = 3;

impl Completion {
    pub(super) fn words(&self) -> [u64; 2] {
        match self {
            Self::Done(pages) => {
                [u64::from(pages.start) | u64::from(pages.end.saturating_sub(pages.start)) << 32, DONE]
            }
            Self::Failed => [0, FAILED],
            Self::Refused => [0, REFUSED],
        }
    }

    /// What the reader wrote, if it is an answer to who asked for these pages.
    pub(super) fn read([filled, result]: [u64; 2], asked: &Range<u32>, shape: Shape) -> Option<Self> {
        match result {
            DONE => {
                let pages = shape.pages_of(filled as u32, (filled >> 32) as u32)?;
                (pages.start <= asked.start && asked.end <= pages.end).then_some(Self::Done(pages))
            }
            FAILED => Some(Self::Failed),
            REFUSED => Some(Self::Refused),
            _ => None,
        }
    }
}
