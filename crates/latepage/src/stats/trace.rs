//! The trace ring: which pages came in, in what order, when and why. It keeps the newest entries and overwrites the oldest.

use std::fmt;
use std::ops::Range;
use std::sync::PoisonError;

use crate::memory::atomic::{AtomicU64, Mutex, Ordering, fence};

/// Why a page appears in the trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reason {
    /// A fault asked for it.
    Demand = 0,
    /// It was brought in beside a page that a fault asked for.
    Beside = 1,
    /// Population brought it in, before anyone asked.
    Population = 2,
    /// The VMM discarded it.
    Removed = 3,
    /// A fault asked for it after the VMM had discarded it, and got zero.
    Cleared = 4,
}

impl Reason {
    /// Every reason, in the order of its number.
    pub const ALL: [Self; 5] = [Self::Demand, Self::Beside, Self::Population, Self::Removed, Self::Cleared];

    /// The reason's name, as in traces and docs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Beside => "beside",
            Self::Population => "population",
            Self::Removed => "removed",
            Self::Cleared => "cleared",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One event of the trace: pages that follow one another and came, or went, together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceEntry {
    /// The first page's index in the session.
    pub page: u32,
    /// How many pages: one at least, [`MOST_PAGES`](Self::MOST_PAGES) at most.
    pub pages: u32,
    /// Why they are in the trace.
    pub reason: Reason,
    /// When, in ns since the session began.
    pub ns: u64,
}

impl TraceEntry {
    /// The most pages of an entry, since it has 24 bits for them: 64 GiB in pages of 4 KiB.
    pub const MOST_PAGES: u32 = 1 << 24;

    fn pack(self) -> [u64; 2] {
        let what = (self.pages - 1) | (self.reason as u32) << 24;
        [u64::from(self.page) | u64::from(what) << 32, self.ns]
    }

    fn unpack([word, ns]: [u64; 2]) -> Self {
        let what = (word >> 32) as u32;
        let pages = what % Self::MOST_PAGES + 1;
        Self { page: word as u32, pages, reason: Reason::ALL[(what >> 24) as usize], ns }
    }
}

/// What a reader got from the ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceRead {
    /// The entries from the cursor on, oldest first.
    pub entries: Vec<TraceEntry>,
    /// Where to go on reading.
    pub cursor: u64,
    /// How many entries after the cursor were overwritten before they could be read.
    pub lost: u64,
}

/// The newest events of a session, 16 bytes each.
///
/// One thread at a time records (whoever has the session's gate; where there are several gates, they take turns); any number of
/// threads read, and never hold the recorder up.
/// Entries are numbered from 0 for as long as the session lives; a cursor is the number of the next entry to read.
#[derive(Debug)]
pub struct TraceRing {
    /// Two words an entry.
    words: Vec<AtomicU64>,
    /// One past the newest entry that the recorder has begun to write: what lay in its slot is lost from then on.
    begun: AtomicU64,
    /// One past the newest entry that is complete.
    complete: AtomicU64,
    /// Where there are several recorders: whose turn it is.
    turn: Option<Mutex<()>>,
}

impl TraceRing {
    /// A ring of `capacity` entries; with 0 nothing is recorded.
    pub fn new(capacity: usize) -> Self {
        // Taken over in place from zeroed memory, which becomes resident only as entries are recorded.
        let words = vec![0_u64; capacity * 2];
        Self {
            words: words.into_iter().map(AtomicU64::new).collect(),
            begun: AtomicU64::new(0),
            complete: AtomicU64::new(0),
            turn: None,
        }
    }

    /// The same, for several recorders at the same time.
    pub fn shared(capacity: usize) -> Self {
        Self { turn: Some(Mutex::new(())), ..Self::new(capacity) }
    }

    /// How many entries it holds.
    pub fn capacity(&self) -> usize {
        self.words.len() / 2
    }

    /// How many entries were recorded so far, overwritten ones included: the cursor that skips them all.
    pub fn recorded(&self) -> u64 {
        self.complete.load(Ordering::Acquire)
    }

    /// Records what became of a run of pages, at `ns` since the session began. Only one thread at a time may call
    /// this, unless the ring is [`shared`](Self::shared).
    #[inline]
    pub fn record(&self, mut pages: Range<u32>, reason: Reason, ns: u64) {
        if self.words.is_empty() {
            return;
        }
        // Nobody panics while he has it, and the ring is whole even then.
        let _turn = self.turn.as_ref().map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner));
        while !pages.is_empty() {
            let count = (pages.end - pages.start).min(TraceEntry::MOST_PAGES);
            self.push(TraceEntry { page: pages.start, pages: count, reason, ns }.pack());
            pages.start += count;
        }
    }

    #[inline]
    fn push(&self, entry: [u64; 2]) {
        let number = self.begun.load(Ordering::Relaxed);
        let [what, when] = self.slot(number);
        self.begun.store(number + 1, Ordering::Relaxed);
        // Whoever reads one of the words below has `begun` from above, once he has fenced: he then knows that his slot was reused.
        fence(Ordering::Release);
        what.store(entry[0], Ordering::Relaxed);
        when.store(entry[1], Ordering::Relaxed);
        self.complete.store(number + 1, Ordering::Release);
    }

    /// The entries from `cursor` on that are still there, where to go on, and how many were lost in between.
    ///
    /// A cursor of 0 reads from the beginning; one beyond the newest entry reads nothing and is set back to it.
    pub fn read_from(&self, cursor: u64) -> TraceRead {
        let capacity = self.capacity() as u64;
        let end = self.complete.load(Ordering::Acquire);
        let start = cursor.clamp(end.saturating_sub(capacity), end);
        let words: Vec<[u64; 2]> =
            (start..end).map(|number| self.slot(number).map(|word| word.load(Ordering::Relaxed))).collect();
        // Pairs with the recorder's fence: if any word read above is a newer entry's, `begun` says so here.
        fence(Ordering::Acquire);
        let begun = self.begun.load(Ordering::Relaxed);
        let intact = begun.saturating_sub(capacity).clamp(start, end);
        let kept = words.into_iter().skip((intact - start) as usize);
        TraceRead {
            entries: kept.map(TraceEntry::unpack).collect(),
            cursor: end,
            lost: intact.saturating_sub(cursor),
        }
    }

    fn slot(&self, number: u64) -> [&AtomicU64; 2] {
        let at = (number % self.capacity() as u64) as usize * 2;
        [&self.words[at], &self.words[at + 1]]
    }
}
