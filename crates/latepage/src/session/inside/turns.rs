//! Waiting for a page that another thread is bringing.
//!
//! Who brings a page looks at one word to know that nobody waits, which is written only where somebody does: threads that bring
//! pages of their own share no cache line that they write. No lock is taken, so that both may be done in a handler.

use std::ops::Range;

use super::word::{Word, looks_like_waiting};
use crate::memory::atomic::{AtomicU64, Ordering, fence};

/// Words to sleep on, each for a part of the pages.
#[derive(Debug)]
pub(super) struct Turns(Box<[Turn]>);

#[derive(Debug)]
#[repr(align(128))]
struct Turn {
    waiting: AtomicU64,
    round: Word,
}

impl Turns {
    pub(super) fn new(words: usize) -> Self {
        let turn = |_| Turn { waiting: AtomicU64::new(0), round: Word::new() };
        Self((0..words.max(1)).map(turn).collect())
    }

    fn of(&self, page: u32) -> &Turn {
        &self.0[page as usize % self.0.len()]
    }

    /// Waits while `still` says that there is a word on the page to come, which [`over`](Self::over) gives.
    pub(super) fn wait(&self, page: u32, still: impl Fn() -> bool) {
        if !looks_like_waiting(&still) {
            return;
        }
        let turn = self.of(page);
        turn.waiting.fetch_add(1, Ordering::AcqRel);
        // With the fence in `over`: of a page that settles and who comes to wait for it, one sees the other.
        fence(Ordering::SeqCst);
        loop {
            let round = turn.round.load();
            if !still() {
                break;
            }
            turn.round.sleep(round);
        }
        turn.waiting.fetch_sub(1, Ordering::AcqRel);
    }

    /// These pages, whose states have changed, are nobody's any more: whoever waits for one looks again.
    pub(super) fn over(&self, pages: Range<u32>) {
        // With the fence in `wait`.
        fence(Ordering::SeqCst);
        for page in pages.take(self.0.len()) {
            let turn = self.of(page);
            if turn.waiting.load(Ordering::Relaxed) > 0 {
                turn.round.advance();
                turn.round.wake();
            }
        }
    }
}
