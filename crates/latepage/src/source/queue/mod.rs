//! Contents that other threads supply: a source that asks, and a queue where whoever can answer takes what is asked.
//!
//! [`QueueSource`] is the source, as a pager takes it. The threads that answer call [`RequestQueue::take`] and then
//! [`RequestQueue::answer`] or [`RequestQueue::fail`]; `latepage.CallbackSource` has Python do that. A request of a fault goes
//! before one of population; requests that wait and lie together are one call; an answer that takes longer than its limit is
//! given up. See `docs/source.md`.

mod state;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Answer, Lane, Source, SourceError};
use state::{Asked, Piece, State, Until};

/// What those who answer have agreed to.
#[derive(Debug, Clone)]
pub struct Terms {
    /// What the source is called in log lines.
    pub name: String,
    /// Bytes of memory.
    pub size: u64,
    /// Calls under way at once, those not counted that are past their limit. At least one.
    pub threads: usize,
    /// The most bytes that a call asks for, unless a single page has more.
    pub batch: u64,
    /// How long a call may take; `None` for as long as it likes.
    pub limit: Option<Duration>,
}

/// Something to supply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Names it to [`RequestQueue::answer`] and [`RequestQueue::fail`].
    pub id: u64,
    /// Bytes from the start of the memory, a multiple of the page size.
    pub offset: u64,
    /// Bytes, a multiple of the page size.
    pub length: u64,
}

/// What a call was answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Contents {
    /// It is all zero.
    Zero,
    /// As many bytes as were asked for.
    Bytes(Vec<u8>),
}

/// An answer of the wrong length. The call is still open: answer it, or fail it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it returned {returned} bytes where {asked} were asked for")]
pub struct WrongLength {
    /// Bytes that came.
    pub returned: u64,
    /// Bytes that should have come.
    pub asked: u64,
}

/// Where requests wait for those who answer.
#[derive(Debug)]
pub struct RequestQueue {
    terms: Terms,
    state: Mutex<State>,
    /// For those who answer: there may be something to take, or nothing more will come.
    work: Condvar,
}

impl RequestQueue {
    /// An empty queue. Nobody is asked, and nobody stays, before there is a source of it or it is held.
    pub fn new(terms: Terms) -> Arc<Self> {
        let terms = Terms { threads: terms.threads.max(1), ..terms };
        Arc::new(Self { terms, state: Mutex::new(State::default()), work: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was agreed.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// A source whose requests come here: one for each pager, since a pager closes the source that it was given.
    pub fn source(self: &Arc<Self>) -> QueueSource {
        let view = self.state().open_view();
        QueueSource { queue: Arc::clone(self), view }
    }

    /// Whether those who answer are needed: there is a source of it, or it is held.
    pub fn is_open(&self) -> bool {
        self.state().is_open()
    }

    /// Keeps those who answer, as a source does, until [`release`](Self::release).
    pub fn hold(&self) {
        self.state().holds += 1;
    }

    /// Takes a [`hold`](Self::hold) back.
    pub fn release(&self) {
        self.state().holds -= 1;
        self.work.notify_all();
    }

    /// Whether one more thread shall call [`take`](Self::take), which is then counted on: beside those that are wanted, as many
    /// again to stand in for threads whose call is past its limit.
    pub fn hire(&self) -> bool {
        let spare = if self.terms.limit.is_some() { self.terms.threads } else { 0 };
        let mut state = self.state();
        let wanted = state.is_open() && state.takers < self.terms.threads + spare;
        state.takers += usize::from(wanted);
        wanted
    }

    /// A thread that was hired will not come, or never again.
    pub fn dismiss(&self) {
        self.state().takers -= 1;
    }

    /// Those who answer are sent away for good, and nothing is answered any more: the program ends.
    pub fn retire(&self) {
        self.state().retired = true;
        self.work.notify_all();
    }

    /// Waits for something to supply. `None`: nothing more will come, and the thread is dismissed.
    pub fn take(&self) -> Option<Call> {
        let mut state = self.state();
        loop {
            if !state.is_open() {
                state.takers -= 1;
                return None;
            }
            if let Some(call) = state.begin(&self.terms, Instant::now()) {
                return Some(call);
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Supplies what a call asked for. Returns whether someone still waited for it.
    ///
    /// # Errors
    /// [`WrongLength`], and the call is as it was.
    pub fn answer(&self, call: u64, contents: Contents) -> Result<bool, WrongLength> {
        let answered = self.state().answer(call, contents);
        self.work.notify_one();
        answered
    }

    /// A call cannot be answered, for a reason in one line. What it covered is asked for again in smaller parts: only the pages
    /// that cannot be had by themselves fail. Returns whether someone still waited for it.
    pub fn fail(&self, call: u64, reason: &str) -> bool {
        let failed = self.state().fail(call, reason);
        self.work.notify_all();
        failed
    }

    fn wait<'a>(&self, asked: Asked, scratch: &'a mut [u8]) -> Result<Answer<'a>, SourceError> {
        let error = |length, reason| SourceError::Foreign {
            what: self.terms.name.clone(),
            offset: asked.offset,
            length,
            reason,
        };
        let left = self.terms.size.saturating_sub(asked.offset);
        if left < asked.unit {
            return Err(error(asked.length, format!("the memory has {} bytes", self.terms.size)));
        }
        let most = left.min(self.terms.batch.max(asked.unit));
        let asked = Asked { length: asked.length.min(most) / asked.unit * asked.unit, ..asked };

        let mut state = self.state();
        let id = match state.submit(asked, &self.terms, Instant::now()) {
            Ok(id) => id,
            Err(reason) => return Err(error(asked.length, reason)),
        };
        self.work.notify_one();
        let outcome = loop {
            let now = Instant::now();
            match state.look(id, &self.terms, now) {
                Until::Done(outcome) => break outcome,
                // The call was given up just now: someone else may be served, by another thread.
                Until::Again => self.work.notify_all(),
                Until::Called(signal) => {
                    state = signal.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                Until::CalledOr(signal, deadline) => {
                    let left = deadline.saturating_duration_since(now);
                    state = signal.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        };
        drop(state);
        match outcome {
            Ok((Piece::Zero, length)) => Ok(Answer::Zero(length)),
            Ok((Piece::Bytes(bytes, start), length)) => {
                let length = length as usize;
                scratch[..length].copy_from_slice(&bytes[start..start + length]);
                Ok(Answer::Bytes(&scratch[..length]))
            }
            Err((reason, length)) => Err(error(length, reason)),
        }
    }
}

/// A source that asks whoever takes from its queue. It has nothing at hand, and a lane of its own.
#[derive(Debug)]
pub struct QueueSource {
    queue: Arc<RequestQueue>,
    view: u64,
}

/// Requests that may wait for each call that may be under way, so that those that lie together can become one call.
const WAITING_FOR_EACH: usize = 4;
const MOST_READERS: usize = 64;
const MOST_POPULATORS: usize = 4;

impl QueueSource {
    fn asked(&self, offset: u64, length: usize, unit: usize, ahead: bool) -> Asked {
        Asked { view: self.view, offset, length: length as u64, unit: unit as u64, ahead }
    }
}

impl Source for QueueSource {
    fn describe(&self) -> String {
        self.queue.terms.name.clone()
    }

    fn size(&self) -> u64 {
        self.queue.terms.size
    }

    fn ask<'a>(&'a self, _: u64, _: usize, _: usize, _: &'a mut [u8]) -> Result<Answer<'a>, SourceError> {
        Ok(Answer::Later)
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.queue.wait(self.asked(offset, length, unit, false), scratch)
    }

    fn wait_ahead<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.queue.wait(self.asked(offset, length, unit, true), scratch)
    }

    fn lane(&self) -> Lane {
        let threads = self.queue.terms.threads;
        Lane::Own {
            readers: (threads * WAITING_FOR_EACH).min(MOST_READERS).max(threads),
            populators: (threads - 1).clamp(1, MOST_POPULATORS),
        }
    }

    fn close(&self) {
        self.queue.state().close_view(self.view);
        self.queue.work.notify_all();
    }
}

impl Drop for QueueSource {
    fn drop(&mut self) {
        self.close();
    }
}
