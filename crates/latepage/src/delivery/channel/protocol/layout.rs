//! Where each word of a channel lies. `docs/channel.md` prints the same tables.

use std::ops::Range;

use thiserror::Error;

/// The version of this layout.
pub const VERSION: u32 = 1;

/// Bytes of a cache line, and of a slot.
pub const LINE: usize = 64;

/// The most slots of a channel: as many as a summary of two levels of 64 bits can name.
pub const MOST_SLOTS: u32 = 4096;

/// "latechan", read as a little-endian word.
const MAGIC: u64 = u64::from_le_bytes(*b"latechan");

/// A channel's memory is a whole number of these.
const PAGE: usize = 4096;

/// The first line: what its maker says of the channel, for good. Offsets in bytes.
mod header {
    pub(super) const MAGIC: usize = 0;
    /// Version in the low half, bytes of a slot in the high one.
    pub(super) const FORM: usize = 8;
    /// Slots in the low half, pages in the high one.
    pub(super) const COUNTS: usize = 16;
    /// Bytes of all of it.
    pub(super) const LENGTH: usize = 24;
}

/// The second line: the reader's. Whether it sleeps.
pub(super) const ARMED: usize = LINE;
/// How many readers there have been.
pub(super) const GENERATION: usize = LINE + 8;

/// The third line: which leaves of the summary have a bit.
pub(super) const TOP: usize = 2 * LINE;

/// Then the leaves of the summary, a line each, and behind them the slots.
const LEAVES: usize = 3 * LINE;

/// Words of a slot, in bytes from its start.
pub(super) mod slot {
    pub(in super::super) const STATE: usize = 0;
    pub(in super::super) const ASKED: usize = 8;
    pub(in super::super) const HOW: usize = 16;
    pub(in super::super) const FILLED: usize = 24;
    pub(in super::super) const RESULT: usize = 32;
    pub(in super::super) const SLEEPS: usize = 40;
}

/// How many slots a channel has, and for how many pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    slots: u32,
    pages: u32,
}

/// Why there is no such channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BadShape {
    /// Slots are 1 to [`MOST_SLOTS`].
    #[error("a channel of {0} slots: it has 1 to {MOST_SLOTS}, one for each thread that waits")]
    Slots(u32),
    /// There is nothing to fault on.
    #[error("a channel for memory without a page")]
    NoPages,
}

/// Why a memory is no channel. Each text says what was found, and what there should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BadHeader {
    /// It does not begin like one.
    #[error("it does not begin with \"latechan\": no channel, or one that was not written yet")]
    Magic,
    /// A version that this side does not speak.
    #[error("it is a channel of version {0}; this side speaks version {VERSION}")]
    Version(u32),
    /// Slots of another size.
    #[error("its slots have {0} bytes; in version {VERSION} they have {LINE}")]
    SlotSize(u32),
    /// Too many slots, too few, or no page.
    #[error(transparent)]
    Shape(#[from] BadShape),
    /// It says of itself that it is longer or shorter than such a channel is.
    #[error("it says that it has {said} bytes; a channel of {slots} slots has {needed}")]
    Length {
        /// What it says.
        said: u64,
        /// What it must have.
        needed: u64,
        /// For so many slots.
        slots: u32,
    },
}

impl Shape {
    /// A channel of so many slots, for a session of so many pages.
    ///
    /// # Errors
    /// [`BadShape`].
    pub const fn new(slots: u32, pages: u32) -> Result<Self, BadShape> {
        if slots == 0 || slots > MOST_SLOTS {
            return Err(BadShape::Slots(slots));
        }
        if pages == 0 {
            return Err(BadShape::NoPages);
        }
        Ok(Self { slots, pages })
    }

    /// How many slots.
    pub const fn slots(self) -> u32 {
        self.slots
    }

    /// For how many pages.
    pub const fn pages(self) -> u32 {
        self.pages
    }

    /// Bytes of its memory: a whole number of pages.
    pub const fn bytes(self) -> usize {
        (self.first_slot() + self.slots as usize * LINE).next_multiple_of(PAGE)
    }

    /// Leaves of its summary.
    pub(super) const fn leaves(self) -> usize {
        self.slots.div_ceil(64) as usize
    }

    const fn first_slot(self) -> usize {
        LEAVES + self.leaves() * LINE
    }

    /// The word of a leaf.
    pub(super) fn leaf(self, leaf: usize) -> usize {
        debug_assert!(leaf < self.leaves());
        LEAVES + leaf * LINE
    }

    /// The bits of a leaf that are slots of this channel.
    pub(super) fn bits_of(self, leaf: usize) -> u64 {
        let slots = self.slots as usize - leaf * 64;
        if slots >= 64 { u64::MAX } else { (1 << slots) - 1 }
    }

    /// A word of a slot.
    pub(super) fn slot(self, slot: u32, word: usize) -> usize {
        debug_assert!(slot < self.slots && word < LINE);
        self.first_slot() + slot as usize * LINE + word
    }

    /// The pages of a request or a completion, if this channel's memory has them.
    pub(super) fn pages_of(self, first: u32, count: u32) -> Option<Range<u32>> {
        let end = first.checked_add(count)?;
        (count > 0 && end <= self.pages).then_some(first..end)
    }
}

/// The four words by which a channel says what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header([u64; 4]);

impl Header {
    /// Where its words lie, in bytes.
    pub const OFFSETS: [usize; 4] = [header::MAGIC, header::FORM, header::COUNTS, header::LENGTH];

    /// What the maker of such a channel writes.
    pub const fn of(shape: Shape) -> Self {
        let form = VERSION as u64 | (LINE as u64) << 32;
        let counts = shape.slots as u64 | (shape.pages as u64) << 32;
        Self([MAGIC, form, counts, shape.bytes() as u64])
    }

    /// Its words, in the order of [`OFFSETS`](Self::OFFSETS).
    pub const fn words(self) -> [u64; 4] {
        self.0
    }

    /// What someone wrote, each word read once.
    pub const fn read(words: [u64; 4]) -> Self {
        Self(words)
    }

    /// What it says, checked.
    ///
    /// # Errors
    /// [`BadHeader`].
    pub fn check(self) -> Result<Shape, BadHeader> {
        let [magic, form, counts, said] = self.0;
        if magic != MAGIC {
            return Err(BadHeader::Magic);
        }
        let (version, slot_size) = (form as u32, (form >> 32) as u32);
        if version != VERSION {
            return Err(BadHeader::Version(version));
        }
        if slot_size as usize != LINE {
            return Err(BadHeader::SlotSize(slot_size));
        }
        let shape = Shape::new(counts as u32, (counts >> 32) as u32)?;
        let needed = shape.bytes() as u64;
        if said != needed {
            return Err(BadHeader::Length { said, needed, slots: shape.slots });
        }
        Ok(shape)
    }
}
