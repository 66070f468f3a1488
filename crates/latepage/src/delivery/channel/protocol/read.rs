//! The pager's side: takes what was posted, many at once, and completes it.

use std::collections::VecDeque;
use std::ops::Range;

use super::Shared;
use super::layout::{self, Shape};
use super::slot::{Completion, Kind, Request, State};
use super::taken::Taken;
use crate::memory::atomic::{AtomicU64, Ordering, fence};

/// Pages after whose release their waiters are woken, and the most waiters that are woken together.
///
/// A thread that is woken wants to run, on the reader's core where there is no other, and the reader's work waits then. Eight pages are
/// filled in about the time that a wake-up takes: that is what the first one loses at most.
pub(super) const TOGETHER: usize = 8;

/// The one reader of a channel. That there is one only, whoever makes it sees to.
///
/// Everything in the memory may have been written by a stranger, at any time. It is bounded in what it makes a reader do: each
/// call looks at every slot at most once, and hands on no more removed pages than it was told to.
#[derive(Debug)]
pub struct Reader<S: Shared> {
    shared: S,
    shape: Shape,
    generation: u32,
    /// Bits of the summary that were cleared there and not followed yet, and which leaves have some.
    leaves: Vec<u64>,
    top: u64,
    /// How often this reader has gone to sleep: tells one arming from another.
    armed: Option<u64>,
    naps: u64,
    taken: Taken,
    /// Removals that were taken and are not completed, as many as there are slots at most: the first of them have been handed on,
    /// the next one perhaps in part.
    removals: VecDeque<Removal>,
    /// Slots that have been completed, and whose owners are woken with the next ones.
    unwoken: Vec<u32>,
    /// Pages that were released since somebody was last woken.
    released: usize,
}

/// The post of a slot that removes pages.
#[derive(Debug)]
struct Removal {
    slot: u32,
    number: u32,
    pages: Range<u32>,
    /// Of these, what has yet to be handed on.
    rest: Range<u32>,
}

impl Removal {
    /// The next part of it, of as many pages as are left to hand on.
    fn part(&mut self, left: &mut u32) -> Range<u32> {
        let part = self.rest.start..self.rest.start + (self.rest.end - self.rest.start).min(*left);
        *left -= part.end - part.start;
        self.rest.start = part.end;
        part
    }
}

impl<S: Shared> Reader<S> {
    /// Begins to read, where the reader before left off: what waits is found whether or not that one had seen it.
    pub(in super::super) fn begin(shared: S, shape: Shape) -> Self {
        let generation =
            shared.word(layout::GENERATION).fetch_add(1, Ordering::AcqRel).wrapping_add(1) as u32;
        let naps = shared.word(layout::ARMED).load(Ordering::Relaxed) >> 1;
        let mut reader = Self {
            shape,
            generation,
            leaves: vec![0; shape.leaves()],
            top: 0,
            armed: None,
            naps,
            taken: Taken::new(shape.slots()),
            removals: VecDeque::with_capacity(shape.slots() as usize),
            unwoken: Vec::with_capacity(TOGETHER),
            released: 0,
            shared,
        };
        for slot in 0..shape.slots() {
            let state = State(reader.word(slot, layout::slot::STATE).load(Ordering::Acquire));
            if state.waits() {
                reader.note(slot);
                continue;
            }
            // As in `wake`: the one before may have died before its fence.
            fence(Ordering::SeqCst);
            if reader.word(slot, layout::slot::SLEEPS).load(Ordering::Relaxed) != 0 {
                // The one before completed it, and died before it woke its owner.
                reader.shared.wake(shape.slot(slot, layout::slot::STATE));
            }
        }
        reader
    }

    /// How many readers there have been, this one included (the low half of it).
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// What it reads.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The memory that it reads.
    pub fn shared(&self) -> &S {
        &self.shared
    }

    fn word(&self, slot: u32, word: usize) -> &AtomicU64 {
        self.shared.word(self.shape.slot(slot, word))
    }

    fn note(&mut self, slot: u32) {
        let leaf = (slot / 64) as usize;
        self.leaves[leaf] |= 1 << (slot % 64);
        self.top |= 1 << leaf;
    }

    /// Takes what was posted, `room` requests at most, and hands each to `found` with its slot. Never blocks.
    ///
    /// Returns whether to come again. If not, nothing was posted, and the reader counts as asleep: the next post rings. What was
    /// handed out before counts as done with by now, as far as it was a removal, and is completed.
    pub fn take(&mut self, room: usize, found: impl FnMut(u32, Request)) -> bool {
        self.take_within(room, u32::MAX, found)
    }

    /// The same with at most so many removed `pages`, for which whoever is handed them has work. A removal of more comes in parts, in
    /// this call and the next ones. It is completed after the last part; faults are taken meanwhile.
    pub fn take_within(&mut self, room: usize, pages: u32, mut found: impl FnMut(u32, Request)) -> bool {
        self.disarm();
        self.wake();
        while self.removals.front().is_some_and(|removal| removal.rest.is_empty())
            && let Some(Removal { slot, number, pages, .. }) = self.removals.pop_front()
        {
            self.complete_one(slot, number, &Completion::Done(pages));
        }
        // What was found is handed out before anything is looked for: otherwise the first slots, whose owners post again at once, would
        // always be ahead of the last ones.
        if self.top == 0 && !self.gather() && self.removals.is_empty() {
            self.arm();
            if !self.gather() {
                return false;
            }
            self.disarm();
        }
        let (mut requests, mut left) = (room, pages);
        for removal in &mut self.removals {
            if requests == 0 || left == 0 {
                break;
            }
            found(removal.slot, Request::Removed(removal.part(&mut left)));
            requests -= 1;
        }
        while requests > 0
            && self.removals.len() < self.shape.slots() as usize
            && let Some(slot) = self.next()
        {
            match self.take_slot(slot) {
                Some((number, request @ Request::Fault { page, .. })) => {
                    self.taken.insert(slot, page, number);
                    found(slot, request);
                }
                Some((number, Request::Removed(pages))) => {
                    let mut removal = Removal { slot, number, rest: pages.clone(), pages };
                    if left > 0 {
                        found(slot, Request::Removed(removal.part(&mut left)));
                    }
                    self.removals.push_back(removal);
                }
                None => continue,
            }
            requests -= 1;
        }
        true
    }

    /// Moves the summary's bits here. Whether there are any.
    pub(super) fn gather(&mut self) -> bool {
        let top = self.shared.word(layout::TOP);
        if top.load(Ordering::Relaxed) != 0 {
            // The top first: see `Seat::announce`.
            let mut bits = top.swap(0, Ordering::AcqRel);
            while bits != 0 {
                let leaf = bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if leaf < self.leaves.len() {
                    let posted = self.shared.word(self.shape.leaf(leaf)).swap(0, Ordering::AcqRel);
                    self.leaves[leaf] |= posted & self.shape.bits_of(leaf);
                    if self.leaves[leaf] != 0 {
                        self.top |= 1 << leaf;
                    }
                }
            }
        }
        self.top != 0
    }

    /// The next slot whose bit was gathered.
    fn next(&mut self) -> Option<u32> {
        if self.top == 0 {
            return None;
        }
        let leaf = self.top.trailing_zeros() as usize;
        let bit = self.leaves[leaf].trailing_zeros();
        self.leaves[leaf] &= self.leaves[leaf] - 1;
        if self.leaves[leaf] == 0 {
            self.top &= self.top - 1;
        }
        Some(leaf as u32 * 64 + bit)
    }

    /// Takes a slot's request. `None` where there is none (any more), or it makes no sense; then it has been refused.
    fn take_slot(&mut self, slot: u32) -> Option<(u32, Request)> {
        let word = self.word(slot, layout::slot::STATE);
        let state = State(word.load(Ordering::Acquire));
        // One that an earlier reader had taken is taken anew. Our own is not: it has been handed out.
        if !state.waits() || state.kind() == Kind::Taken && state.generation() == self.generation {
            return None;
        }
        let words = [layout::slot::ASKED, layout::slot::HOW]
            .map(|word| self.word(slot, word).load(Ordering::Relaxed));
        let taken = State::new(Kind::Taken, state.number(), self.generation);
        // Should its owner have posted anew while we read, its bit comes again.
        word.compare_exchange(state.0, taken.0, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        let request = Request::read(words, self.shape);
        if request.is_none() {
            self.complete_one(slot, state.number(), &Completion::Refused);
        }
        Some((state.number(), request?))
    }

    /// Says that the next post shall ring, unless a bit is there already.
    fn arm(&mut self) {
        self.naps = self.naps.wrapping_add(1);
        let armed = self.naps << 1 | 1;
        self.armed = Some(armed);
        // A swap: with a plain store loom could not tell which of it and a post's answer to the arming before came first.
        self.shared.word(layout::ARMED).swap(armed, Ordering::Relaxed);
        // With the fence between a post and its look at that word: one of the two sees the other.
        fence(Ordering::SeqCst);
    }

    /// Awake: no post need ring.
    fn disarm(&mut self) {
        let Some(armed) = self.armed.take() else { return };
        // Most often who rang has done it.
        let _ = self.shared.word(layout::ARMED).compare_exchange(
            armed,
            armed & !1,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
    }

    /// Completes every request for a page of these: all of them have been seen to.
    pub fn release(&mut self, pages: &Range<u32>) {
        self.complete_all(pages, &Completion::Done(pages.clone()));
        self.wake();
    }

    /// The same, where more will be released in a moment: their owners may sleep on until a few can be woken together, and until
    /// [`wake`](Self::wake) at the latest, which must follow.
    pub fn release_among_others(&mut self, pages: &Range<u32>) {
        self.complete_all(pages, &Completion::Done(pages.clone()));
        self.released += pages.len();
        if self.released >= TOGETHER {
            self.wake();
        }
    }

    /// Wakes who was released among others, and has not been woken yet.
    pub fn wake(&mut self) {
        self.released = 0;
        if self.unwoken.is_empty() {
            return;
        }
        // With the fence between an owner's falling asleep and his last look: one of the two sees the other.
        fence(Ordering::SeqCst);
        for slot in self.unwoken.drain(..) {
            // He may have seen it himself, and may even sleep for another page by now: then he looks once for nothing.
            let word = |word| self.shape.slot(slot, word);
            if self.shared.word(word(layout::slot::SLEEPS)).load(Ordering::Relaxed) != 0 {
                self.shared.wake(word(layout::slot::STATE));
            }
        }
    }

    /// Completes every request for a page of these: they cannot be had.
    pub fn fail(&mut self, pages: &Range<u32>) {
        self.complete_all(pages, &Completion::Failed);
        self.wake();
    }

    fn complete_all(&mut self, pages: &Range<u32>, completion: &Completion) {
        if self.taken.is_empty() {
            return;
        }
        if pages.len() <= self.shape.slots() as usize {
            for page in pages.clone() {
                while let Some((slot, number)) = self.taken.pop(page) {
                    self.complete_soon(slot, number, completion);
                }
            }
        } else {
            for slot in 0..self.shape.slots() {
                if let Some((slot, number)) = self.taken.pop_slot(slot, pages) {
                    self.complete_soon(slot, number, completion);
                }
            }
        }
    }

    fn complete_one(&mut self, slot: u32, number: u32, completion: &Completion) {
        self.complete_soon(slot, number, completion);
        self.wake();
    }

    /// Completes a post; its owner is woken with others.
    fn complete_soon(&mut self, slot: u32, number: u32, completion: &Completion) {
        if self.complete(slot, number, completion) {
            self.unwoken.push(slot);
            if self.unwoken.len() == TOGETHER {
                self.wake();
            }
        }
    }

    /// Completes the post of that number, if it still waits. Whether it did; its owner, who may sleep, is to be woken then.
    fn complete(&self, slot: u32, number: u32, completion: &Completion) -> bool {
        let taken = State::new(Kind::Taken, number, self.generation);
        let done = State::new(Kind::Done, number, self.generation);
        let state = self.word(slot, layout::slot::STATE);
        if state.load(Ordering::Relaxed) != taken.0 {
            // Given up. What stands beside it may be the answer to a later post, which nobody must write over.
            return false;
        }
        let [filled, result] = completion.words();
        // Should it be given up just now, a later post has its answer written here again before anyone looks: by this reader.
        self.word(slot, layout::slot::FILLED).store(filled, Ordering::Relaxed);
        self.word(slot, layout::slot::RESULT).store(result, Ordering::Relaxed);
        state.compare_exchange(taken.0, done.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}
