//! Delivery: how faults reach whoever resolves them, and how those who wait are released.

pub mod channel;
#[cfg(test)]
mod tests;
mod uffd;

use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::memory::Layout;
use crate::sys::uffd::MessageBuffer;

pub use crate::sys::uffd::FaultFlags;
pub use uffd::UffdDelivery;

/// One access to an absent page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The page, by its index in the session.
    pub page: u32,
    /// Write, write-protect, minor; empty is a read of a missing page.
    pub flags: FaultFlags,
    /// The thread that waits, where the delivery knows it; else 0.
    pub thread: u32,
}

/// Something a delivery may bring and a session cannot serve: it is reported, and never silently dropped.
#[derive(Debug, thiserror::Error)]
pub enum Surprise {
    /// A fault outside every region of the layout, at this address.
    #[error("a fault at {0:#x}, outside every region that the VM named")]
    Stray(u64),
    /// A message about this address, which lies in another shard than its userfaultfd's.
    #[error("a message about {0:#x} by a userfaultfd that was announced for another shard of the memory")]
    Misplaced(u64),
    /// Memory moved from one address to another, for so many bytes.
    #[error("memory moved from {from:#x} to {to:#x} ({length:#x} bytes): its faults cannot be served there")]
    Moved {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// The owner forked. This userfaultfd over the child's memory is held, since closing it would give the child zero pages.
    #[error("the VM forked: faults of the child are not served")]
    Forked(OwnedFd),
    /// A message that is not known.
    #[error("a userfaultfd message of unknown kind {0:#x}")]
    Unknown(u8),
}

/// What one look at a delivery brought. Allocated once for each thread that serves, and used again.
pub struct Batch {
    /// Page ranges that were taken away: they come first, whatever order the kernel had.
    pub removed: Vec<Range<u32>>,
    /// Faults, in the order of the delivery.
    pub faults: Vec<Fault>,
    /// What fits nowhere else.
    pub surprises: Vec<Surprise>,
    /// Whether more may be waiting.
    pub more: bool,
    /// The most that a delivery adds at a time.
    pub room: usize,
    pub(crate) messages: MessageBuffer,
}

impl Batch {
    /// The most removed pages that a delivery adds at a time where it need not hand all of a removal on at once. Walking them is work,
    /// and a VM may discard all of its memory with every message. Of a userfaultfd's events none can wait: who discards goes on as
    /// soon as they are read.
    pub const REMOVALS: u32 = 4096;

    /// Room for `capacity` faults at a time.
    pub fn new(capacity: usize) -> Self {
        Self {
            removed: Vec::with_capacity(capacity),
            faults: Vec::with_capacity(capacity),
            surprises: Vec::new(),
            more: false,
            room: capacity,
            messages: MessageBuffer::new(capacity),
        }
    }

    /// Empties it, for the next look.
    pub fn clear(&mut self) {
        self.removed.clear();
        self.faults.clear();
        self.surprises.clear();
        self.more = false;
    }
}

/// A delivery failed as a whole; the session cannot go on with it.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {errno}")]
pub struct DeliveryError {
    /// The call that failed.
    pub call: &'static str,
    /// What the kernel said.
    pub errno: rustix::io::Errno,
}

/// How faults reach us, and how those who wait are released.
pub trait Delivery: Send {
    /// Adds to `batch` what waits, as much as it has room for, removals apart, of which it may keep back all beyond
    /// [`Batch::REMOVALS`] pages for the next call. Never blocks. Says in `more` if it may have more: if
    /// not, its descriptor becomes readable with the next.
    ///
    /// What was taken before has been seen to by the time of the next call, as far as it was a removal.
    ///
    /// # Errors
    /// [`DeliveryError`] where nothing more can ever come.
    fn take(&mut self, layout: &Layout, batch: &mut Batch) -> Result<(), DeliveryError>;

    /// Releases everyone who waits for a page of the range, which lies in one region. They look again.
    fn release(&mut self, layout: &Layout, pages: Range<u32>);

    /// Pages have come, by an install that has woken those whom the kernel knows to wait. Whoever else waits here is released.
    fn installed(&mut self, _layout: &Layout, _pages: Range<u32>) {}

    /// Pages that cannot be had were poisoned, which has woken those whom the kernel knows to wait. Whoever else waits here is told.
    fn failed(&mut self, _layout: &Layout, _pages: Range<u32>) {}

    /// Each fault that was taken last has been seen to: who was released since then, and was to be woken together with others, is woken.
    fn served(&mut self) {}

    /// A descriptor that polls readable when there is something to take.
    fn descriptor(&self) -> BorrowedFd<'_>;
}
