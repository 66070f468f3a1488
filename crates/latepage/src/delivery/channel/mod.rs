//! The channel: shared memory through which a VMM's threads post faults and wait for pages. `docs/channel.md` is its description.
//!
//! The VMM makes a [`Channel`] and hands its two descriptors to the pager. Each thread that may fault takes a [`Seat`] at a slot of
//! its own. The pager [`attach`]es, takes what was posted, and completes it; a
//! [`ChannelDelivery`] does so for a session.
//!
//! ```
//! use std::os::fd::AsFd;
//!
//! use latepage::delivery::channel::{Channel, Completion, Request, Waited, attach};
//!
//! // The VMM: two threads, memory of eight pages.
//! let channel = Channel::new(2, 8)?;
//! let mut seat = channel.seat(0).expect("nobody sits there");
//! seat.post(&Request::Fault { page: 3, write: false, thread: 0 })?;
//!
//! // The pager, most often in another process.
//! let (memory, eventfd) = channel.descriptors();
//! let mut reader = attach(memory, eventfd.try_clone_to_owned()?, 8, 2)?;
//! let mut posted = Vec::new();
//! reader.take(64, |slot, request| posted.push((slot, request)));
//! assert_eq!(posted, [(0, Request::Fault { page: 3, write: false, thread: 0 })]);
//! reader.release(&(2..6)); // four pages were filled, with that one
//!
//! assert_eq!(seat.wait(100, None), Waited::Over(Completion::Done(2..6)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod delivery;
mod memory;
mod protocol;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use delivery::ChannelDelivery;
pub use memory::{AttachError, ChannelMemory, MakeError, attach};
pub use protocol::{
    BadHeader, BadShape, Completion, Header, LINE, MOST_SLOTS, Pending, Reader, Request, Shape, Shared,
    VERSION, Waited, Woken,
};

/// A thread's seat at a channel of this process.
pub type Seat = protocol::Seat<Arc<ChannelMemory>>;

/// The VMM's side of a channel.
#[derive(Debug)]
pub struct Channel {
    memory: Arc<ChannelMemory>,
    file: OwnedFd,
    shape: Shape,
    /// Which seats have been given away.
    given: Box<[AtomicBool]>,
}

impl Channel {
    /// Makes one of so many slots (1 to [`MOST_SLOTS`]), for a session of so many pages.
    ///
    /// A slot for each thread that may wait at the same time as others: each vCPU, and whoever discards memory or forwards faults.
    ///
    /// # Errors
    /// [`MakeError`].
    pub fn new(slots: u32, pages: u32) -> Result<Self, MakeError> {
        let shape = Shape::new(slots, pages)?;
        let (memory, file) = memory::make(shape)?;
        Ok(Self::over(memory, file, shape))
    }

    /// The channel of a VMM that this one replaces, from the two descriptors that [`descriptors`](Self::descriptors) gave there. Its
    /// reader goes on as if nothing had happened.
    ///
    /// All seats may be given anew: the threads of the VMM before must be dead, or have left theirs. What they still waited for is
    /// given up when the next one sits down; an answer that is on its way to them is told nobody.
    ///
    /// # Errors
    /// [`AttachError`]: as a reader, it trusts the memory only where its length cannot change.
    pub fn from_descriptors(memory: OwnedFd, eventfd: OwnedFd) -> Result<Self, AttachError> {
        let (mapped, shape) = memory::adopt(memory.as_fd(), eventfd)?;
        Ok(Self::over(mapped, memory, shape))
    }

    fn over(memory: Arc<ChannelMemory>, file: OwnedFd, shape: Shape) -> Self {
        let given = (0..shape.slots()).map(|_| AtomicBool::new(false)).collect();
        Self { memory, file, shape, given }
    }

    /// What the reader is handed: the memory, sealed, and the eventfd.
    pub fn descriptors(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.file.as_fd(), self.memory.bell())
    }

    /// Its slots and pages.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The seat at a slot; `None` where there is no such slot, or its seat was given away.
    pub fn seat(&self, slot: u32) -> Option<Seat> {
        let given = self.given.get(slot as usize)?;
        (!given.swap(true, Ordering::AcqRel)).then(|| self.take_over(slot))
    }

    /// The seat of a thread that has died, in whatever state it has left it. The caller knows that it is dead.
    ///
    /// # Panics
    /// Where there is no such slot.
    pub fn take_over(&self, slot: u32) -> Seat {
        self.given[slot as usize].store(true, Ordering::Release);
        Seat::take(Arc::clone(&self.memory), self.shape, slot)
    }
}
