//! Faults by a channel, for a session.

use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::{ChannelMemory, Reader, Request};
use crate::delivery::{Batch, Delivery, DeliveryError, Fault, FaultFlags};
use crate::memory::Layout;

/// Faults of the threads that sit at one channel.
pub struct ChannelDelivery {
    reader: Reader<ChannelMemory>,
}

impl ChannelDelivery {
    /// Over a channel that this process reads.
    pub fn new(reader: Reader<ChannelMemory>) -> Self {
        Self { reader }
    }
}

impl Delivery for ChannelDelivery {
    fn take(&mut self, _: &Layout, batch: &mut Batch) -> Result<(), DeliveryError> {
        let (faults, removed) = (&mut batch.faults, &mut batch.removed);
        batch.more |= self.reader.take(batch.room, |_, request| match request {
            Request::Fault { page, write, thread } => {
                let flags = if write { FaultFlags::WRITE } else { FaultFlags::empty() };
                faults.push(Fault { page, flags, thread });
            }
            Request::Removed(pages) => removed.push(pages),
        });
        Ok(())
    }

    fn release(&mut self, _: &Layout, pages: Range<u32>) {
        self.reader.release(&pages);
    }

    /// The kernel knows of nobody who waits here.
    fn installed(&mut self, layout: &Layout, pages: Range<u32>) {
        self.release(layout, pages);
    }

    fn failed(&mut self, _: &Layout, pages: Range<u32>) {
        self.reader.fail(&pages);
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.reader.shared().bell()
    }
}
