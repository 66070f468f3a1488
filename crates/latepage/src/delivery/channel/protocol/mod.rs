//! The channel's protocol: words in shared memory, and nothing else. It knows neither files nor system calls, so that loom can
//! explore it; what it needs of the kernel it asks of [`Shared`].
//!
//! Two sides share a channel: the VMM's threads *post* ([`Seat`]), one *reader* takes and completes ([`Reader`]). Each trusts the
//! memory no further than a stranger's: a word is read once, and checked before it is used.

mod layout;
mod post;
#[cfg(all(test, loom))]
mod races;
mod read;
mod slot;
mod taken;

use std::sync::Arc;
use std::time::Duration;

use crate::memory::atomic::AtomicU64;

pub use layout::{BadHeader, BadShape, Header, LINE, MOST_SLOTS, Shape, VERSION};
pub(super) use post::Seat;
pub use post::{Pending, Waited};
pub use read::Reader;
pub use slot::{Completion, Request};

/// Why a thread that slept on a word goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// It was woken, or the word was another one already, or for no reason: it looks again.
    Look,
    /// A signal came.
    Interrupted,
    /// Its time is over.
    TimedOut,
}

/// The memory of a channel, and how its sides wake each other.
pub trait Shared {
    /// The word at an offset that [`Shape`] gave out.
    fn word(&self, offset: usize) -> &AtomicU64;

    /// Sleeps while the low half of the word is `low`.
    fn sleep(&self, offset: usize, low: u32, timeout: Option<Duration>) -> Woken;

    /// Wakes who sleeps on the word.
    fn wake(&self, offset: usize);

    /// Wakes the reader.
    fn ring(&self);
}

impl<S: Shared> Shared for Arc<S> {
    fn word(&self, offset: usize) -> &AtomicU64 {
        (**self).word(offset)
    }

    fn sleep(&self, offset: usize, low: u32, timeout: Option<Duration>) -> Woken {
        (**self).sleep(offset, low, timeout)
    }

    fn wake(&self, offset: usize) {
        (**self).wake(offset);
    }

    fn ring(&self) {
        (**self).ring();
    }
}
