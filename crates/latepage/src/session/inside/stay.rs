//! Whether the thread of a seat may be bringing pages just now, and waiting until it no longer does what it was at.
//!
//! It stands for the gate where threads resolve their own faults: they never wait for each other here, and write only what is their
//! own. Whoever discards marks the pages first, and outlasts every stay afterwards. A thread that claimed one of them before the mark
//! had begun its stay before that claim, and a mark sees all that came before the claim that it replaces: so its stay is seen, and
//! waited for. No fence is needed, nor any word that two resolving threads share.

use super::word::{Word, looks_like_waiting};

/// Its thread may be bringing pages.
const INSIDE: u64 = 1;
/// Somebody waits until it no longer is.
const AWAITED: u64 = 2;
/// Above these, how many stays there have been.
const ONE: u64 = 4;

/// The stays of one thread.
#[derive(Debug)]
pub(super) struct Stay(Word);

/// The thread is inside.
pub(super) struct Inside<'a>(&'a Stay);

impl Stay {
    pub(super) fn new() -> Self {
        Self(Word::new())
    }

    /// Goes inside, before the first page is claimed. For the thread that it belongs to, which is outside.
    pub(super) fn enter(&self) -> Inside<'_> {
        // Nobody else writes to the word of a thread that is outside.
        self.0.store(self.0.load() | INSIDE);
        Inside(self)
    }

    /// Waits until the stay that is seen now, if there is one, has ended.
    pub(super) fn outlast(&self) {
        let mut seen = self.0.load();
        let stay = seen / ONE;
        let lasts = |seen: u64| seen & INSIDE != 0 && seen / ONE == stay;
        if !lasts(seen) || !looks_like_waiting(|| lasts(self.0.load())) {
            return;
        }
        while lasts(seen) {
            match self.0.exchange(seen, seen | AWAITED) {
                Ok(_) => {
                    self.0.sleep(seen | AWAITED);
                    seen = self.0.load();
                }
                Err(now) => seen = now,
            }
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let stay = &self.0.0;
        if stay.swap((stay.load() / ONE + 1) * ONE) & AWAITED != 0 {
            stay.wake();
        }
    }
}
