//! Faults by a channel, for a session.

use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::{ChannelMemory, Reader, Request};
use crate::delivery::{Batch, Delivery, DeliveryError, Fault, FaultFlags};
use crate::memory::Layout;

/// So many faults taken at once are a crowd's: who waits for them is woken a few at a time, and somebody else uses the cores until then.
/// Where fewer wait, a core may stand idle until one of them is woken.
const CROWD: usize = 16;

/// Faults of the threads that sit at one channel.
pub struct ChannelDelivery {
    reader: Reader<ChannelMemory>,
    /// A crowd's faults were taken, and are being served.
    crowd: bool,
}

impl ChannelDelivery {
    /// Over a channel that this process reads.
    pub fn new(reader: Reader<ChannelMemory>) -> Self {
        Self { reader, crowd: false }
    }
}

impl Delivery for ChannelDelivery {
    fn take(&mut self, _: &Layout, batch: &mut Batch) -> Result<(), DeliveryError> {
        let before = batch.faults.len();
        let (faults, removed) = (&mut batch.faults, &mut batch.removed);
        batch.more |= self.reader.take_within(batch.room, Batch::REMOVALS, |_, request| match request {
            Request::Fault { page, write, thread } => {
                let flags = if write { FaultFlags::WRITE } else { FaultFlags::empty() };
                faults.push(Fault { page, flags, thread });
            }
            Request::Removed(pages) => removed.push(pages),
        });
        self.crowd = batch.faults.len() - before >= CROWD;
        Ok(())
    }

    fn release(&mut self, _: &Layout, pages: Range<u32>) {
        if self.crowd {
            self.reader.release_among_others(&pages);
        } else {
            self.reader.release(&pages);
        }
    }

    /// The kernel knows of nobody who waits here.
    fn installed(&mut self, layout: &Layout, pages: Range<u32>) {
        self.release(layout, pages);
    }

    fn failed(&mut self, _: &Layout, pages: Range<u32>) {
        self.reader.fail(&pages);
    }

    fn served(&mut self) {
        self.crowd = false;
        self.reader.wake();
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.reader.shared().bell()
    }
}
