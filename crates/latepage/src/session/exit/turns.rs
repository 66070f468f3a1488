//! Waiting for a page that another thread is bringing.

use super::word::Word;
use crate::memory::atomic::{AtomicU64, Ordering, fence};

/// Words to sleep on, each for a part of the pages.
#[derive(Debug)]
pub(super) struct Turns(Box<[Turn]>);

#[derive(Debug)]
#[repr(align(64))]
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

    /// Waits for a word on the page, unless `still` says that there is none to come any more.
    pub(super) fn wait(&self, page: u32, still: impl Fn() -> bool) {
        let turn = self.of(page);
        turn.waiting.fetch_add(1, Ordering::AcqRel);
        // With the fence in `over`: of a page that settles and who comes to wait for it, one sees the other.
        fence(Ordering::SeqCst);
        let round = turn.round.load();
        if still() {
            turn.round.sleep(round);
        }
        turn.waiting.fetch_sub(1, Ordering::AcqRel);
    }

    /// The page is nobody's any more: whoever waits for it looks again.
    pub(super) fn over(&self, page: u32) {
        let turn = self.of(page);
        // With the fence in `wait`.
        fence(Ordering::SeqCst);
        if turn.waiting.load(Ordering::Relaxed) > 0 {
            turn.round.advance();
            turn.round.wake();
        }
    }
}
