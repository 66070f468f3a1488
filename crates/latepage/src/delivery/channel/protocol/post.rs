//! The VMM's side: a thread's seat at its slot.

use std::hint::spin_loop;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::layout::{self, Shape};
use super::slot::{Completion, Kind, Request, State};
use super::{Shared, Woken};
use crate::memory::atomic::{Ordering, fence};

/// How a wait ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The request is over.
    Over(Completion),
    /// A signal came. The request stands: wait again, or abandon it.
    Interrupted,
    /// The time is over. The request stands.
    TimedOut,
    /// What stands in the slot is no answer to this request: somebody else uses the slot, or the reader writes what it must not.
    Garbled,
}

/// There is a request already, and it has not been completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this slot's request has not been completed: wait for it, or abandon it")]
pub struct Pending;

/// A thread's seat at its slot: it posts one request at a time, and waits for what comes of it.
///
/// Posting and waiting allocate nothing, take no lock, and may be done in a signal handler.
#[derive(Debug)]
pub struct Seat<S: Shared> {
    shared: S,
    shape: Shape,
    slot: u32,
    /// The number of the last post.
    number: u32,
    /// What was posted and is not over.
    asked: Option<Range<u32>>,
}

impl<S: Shared> Seat<S> {
    /// Takes the seat, in whatever state the thread before has left it. No other thread may sit there.
    pub(in super::super) fn take(shared: S, shape: Shape, slot: u32) -> Self {
        let state = State(shared.word(shape.slot(slot, layout::slot::STATE)).load(Ordering::Acquire));
        let mut seat = Self { shared, shape, slot, number: state.number(), asked: None };
        if state.waits() {
            seat.free();
        }
        seat
    }

    /// Its slot.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    fn word(&self, word: usize) -> &crate::memory::atomic::AtomicU64 {
        self.shared.word(self.shape.slot(self.slot, word))
    }

    /// Posts a request. The reader is woken if it sleeps.
    ///
    /// # Errors
    /// [`Pending`].
    pub fn post(&mut self, request: &Request) -> Result<(), Pending> {
        if self.asked.is_some() {
            return Err(Pending);
        }
        let [asked, how] = request.words();
        self.number = State::after(self.number);
        self.asked = Some(request.pages());
        self.word(layout::slot::ASKED).store(asked, Ordering::Relaxed);
        self.word(layout::slot::HOW).store(how, Ordering::Relaxed);
        // Whoever sees the state sees what is asked.
        self.word(layout::slot::STATE).store(State::new(Kind::Posted, self.number, 0).0, Ordering::Release);
        self.announce();
        Ok(())
    }

    /// The slot's bit in the summary, and the bell if the reader sleeps.
    fn announce(&self) {
        let (leaf, bit) = ((self.slot / 64) as usize, 1 << (self.slot % 64));
        self.shared.word(self.shape.leaf(leaf)).fetch_or(bit, Ordering::AcqRel);
        // Most often another slot of the leaf has set it, and the line of the top word need not be fetched to be written. The
        // reader clears the top before it clears a leaf: so a bit that stands here is one that it has yet to follow.
        let top = self.shared.word(layout::TOP);
        if top.load(Ordering::Acquire) & 1 << leaf == 0 {
            top.fetch_or(1 << leaf, Ordering::AcqRel);
        }
        // With the fence between the reader's arming and its last look: one of the two sees the other.
        fence(Ordering::SeqCst);
        let armed = self.shared.word(layout::ARMED);
        let now = armed.load(Ordering::Relaxed);
        if now & 1 == 1 {
            // The bell first: a thread that died between the two would leave a reader that nobody wakes. That the reader has
            // armed itself anew meanwhile shows in the number.
            self.shared.ring();
            let _ = armed.compare_exchange(now, now & !1, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Waits for the request that was posted: looks `spins` times, then sleeps, for `timeout` at most.
    ///
    /// Without a request there is nothing to wait for, and the answer is [`Waited::Garbled`].
    pub fn wait(&mut self, spins: u32, timeout: Option<Duration>) -> Waited {
        for _ in 0..spins {
            if let Some(over) = self.look() {
                return over;
            }
            spin_loop();
        }
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let sleeps = self.word(layout::slot::SLEEPS);
        sleeps.store(1, Ordering::Relaxed);
        // With the fence between a completion and the reader's look at this word: one of the two sees the other.
        fence(Ordering::SeqCst);
        let waited = loop {
            let state = State(self.word(layout::slot::STATE).load(Ordering::Acquire));
            if let Some(over) = self.over(state) {
                break over;
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                break Waited::TimedOut;
            }
            match self.shared.sleep(self.shape.slot(self.slot, layout::slot::STATE), state.low(), left) {
                Woken::Look | Woken::TimedOut => {}
                Woken::Interrupted => break Waited::Interrupted,
            }
        };
        self.word(layout::slot::SLEEPS).store(0, Ordering::Relaxed);
        if matches!(waited, Waited::Over(_) | Waited::Garbled) {
            self.asked = None;
        }
        waited
    }

    /// What came of the request, if it is over.
    fn look(&mut self) -> Option<Waited> {
        let state = State(self.word(layout::slot::STATE).load(Ordering::Acquire));
        let over = self.over(state)?;
        self.asked = None;
        Some(over)
    }

    fn over(&self, state: State) -> Option<Waited> {
        let Some(asked) = self.asked.as_ref().filter(|_| state.number() == self.number) else {
            return Some(Waited::Garbled);
        };
        match state.kind() {
            Kind::Posted | Kind::Taken => None,
            Kind::Free => Some(Waited::Garbled),
            Kind::Done => {
                let words = [layout::slot::FILLED, layout::slot::RESULT]
                    .map(|word| self.word(word).load(Ordering::Relaxed));
                let completion = Completion::read(words, asked, self.shape);
                Some(completion.map_or(Waited::Garbled, Waited::Over))
            }
        }
    }

    /// Gives the request up: whatever the reader still does for it is told nobody. Does nothing where none stands.
    pub fn abandon(&mut self) {
        if self.asked.take().is_some() {
            self.free();
        }
    }

    /// Forgets the request, as a thread does that dies.
    #[cfg(all(test, loom))]
    pub(super) fn forget(&mut self) {
        self.asked = None;
    }

    /// Frees the slot, so that a completion that is on its way finds nothing to complete.
    fn free(&mut self) {
        let word = self.word(layout::slot::STATE);
        let mut state = State(word.load(Ordering::Acquire));
        // At most once for each step that the reader takes meanwhile: posted, taken, done.
        while state.waits() {
            let free = State::new(Kind::Free, state.number(), 0);
            match word.compare_exchange(state.0, free.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => state = State(now),
            }
        }
        self.word(layout::slot::SLEEPS).store(0, Ordering::Relaxed);
    }
}

/// A thread that leaves in the middle, by a panic say, leaves a slot that the next one can use.
impl<S: Shared> Drop for Seat<S> {
    fn drop(&mut self) {
        self.abandon();
    }
}
