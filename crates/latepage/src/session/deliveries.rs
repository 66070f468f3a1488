//! The deliveries of a session: one, or several side by side, as where vCPUs post to a channel and KVM's own accesses come by
//! userfaultfd. A page that comes releases whoever waits for it, wherever.

use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::delivery::{Batch, Delivery, DeliveryError};
use crate::memory::Layout;

/// All of them. One worker serves them, together.
pub(super) struct Deliveries(Vec<Box<dyn Delivery>>);

impl Deliveries {
    pub(super) fn new(deliveries: Vec<Box<dyn Delivery>>) -> Self {
        Self(deliveries)
    }

    /// What waits at any of them, removals apart from the faults.
    pub(super) fn take(&mut self, layout: &Layout, batch: &mut Batch) -> Result<(), DeliveryError> {
        batch.clear();
        self.0.iter_mut().try_for_each(|delivery| delivery.take(layout, batch))
    }

    /// Releases everyone who waits for a page of the range, which lies in one region.
    pub(super) fn release(&mut self, layout: &Layout, pages: Range<u32>) {
        for delivery in &mut self.0 {
            delivery.release(layout, pages.clone());
        }
    }

    /// Pages have come, by an install that has woken those whom the kernel knows to wait.
    pub(super) fn installed(&mut self, layout: &Layout, pages: Range<u32>) {
        for delivery in &mut self.0 {
            delivery.installed(layout, pages.clone());
        }
    }

    /// Pages were poisoned, which has woken those whom the kernel knows to wait.
    pub(super) fn failed(&mut self, layout: &Layout, pages: Range<u32>) {
        for delivery in &mut self.0 {
            delivery.failed(layout, pages.clone());
        }
    }

    /// The faults that were taken last have been seen to: nobody who was released sleeps on.
    pub(super) fn served(&mut self) {
        self.0.iter_mut().for_each(|delivery| delivery.served());
    }

    /// A descriptor of each, that polls readable when there is something to take.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|delivery| delivery.descriptor())
    }
}
