//! Faults by userfaultfd.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::{Batch, Delivery, DeliveryError, Fault, Surprise};
use crate::memory::Layout;
use crate::sys::uffd::{Message, Userfaultfd};

/// Faults of one userfaultfd: its creator's memory, wherever that lives.
pub struct UffdDelivery {
    uffd: Arc<Userfaultfd>,
    /// The pages that it may tell of.
    pages: Range<u32>,
}

impl UffdDelivery {
    /// Over a userfaultfd whose ranges its creator has registered.
    pub fn new(uffd: Arc<Userfaultfd>) -> Self {
        Self::over(uffd, 0..u32::MAX)
    }

    /// Over one of several userfaultfds of a VM, of which this one is registered over these pages. What it tells of others is a
    /// surprise: whoever reads another userfaultfd installs those.
    pub fn over(uffd: Arc<Userfaultfd>, pages: Range<u32>) -> Self {
        Self { uffd, pages }
    }
}

impl Delivery for UffdDelivery {
    fn take(&mut self, layout: &Layout, batch: &mut Batch) -> Result<(), DeliveryError> {
        self.uffd
            .read(&mut batch.messages)
            .map_err(|errno| DeliveryError { call: "read(userfaultfd)", errno })?;
        batch.more |= batch.messages.is_full();
        for message in batch.messages.drain() {
            match message {
                Message::PageFault { address, flags, thread } => match layout.find_hva(address) {
                    Some(page) if self.pages.contains(&page) => {
                        batch.faults.push(Fault { page, flags, thread })
                    }
                    Some(_) => batch.surprises.push(Surprise::Misplaced(address)),
                    None => batch.surprises.push(Surprise::Stray(address)),
                },
                // What was unmapped, as what was discarded, never comes from the snapshot again.
                Message::Remove { start, end } | Message::Unmap { start, end } => {
                    for pages in layout.pages_in_hva(start, end) {
                        let mine = pages.start.max(self.pages.start)..pages.end.min(self.pages.end);
                        if mine != pages {
                            batch.surprises.push(Surprise::Misplaced(start));
                        }
                        if !mine.is_empty() {
                            batch.removed.push(mine);
                        }
                    }
                }
                Message::Remap { from, to, length } => {
                    batch.surprises.push(Surprise::Moved { from, to, length })
                }
                Message::Fork(fd) => batch.surprises.push(Surprise::Forked(fd)),
                Message::Unknown(event) => batch.surprises.push(Surprise::Unknown(event)),
            }
        }
        merge(&mut batch.removed);
        Ok(())
    }

    fn release(&mut self, layout: &Layout, pages: Range<u32>) {
        let place = layout.place(pages.start);
        let length = u64::from(pages.end - pages.start) * place.page_size.bytes();
        // It fails for an unaligned or empty range alone, and a layout has neither.
        let woken = self.uffd.wake(place.hva, length);
        debug_assert!(woken.is_ok(), "{woken:?}");
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

/// Joins ranges that overlap or touch: a VMM that discards the same memory again and again costs one walk of it for each read.
fn merge(ranges: &mut Vec<Range<u32>>) {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, merged| {
        let joined = next.start <= merged.end;
        if joined {
            merged.end = merged.end.max(next.end);
        }
        joined
    });
}

#[cfg(test)]
mod merging {
    use super::merge;

    #[test]
    fn discards_of_the_same_memory_are_one() {
        let mut ranges = vec![8..12, 0..4, 2..6, 6..7, 0..4, 20..21, 9..10];
        merge(&mut ranges);
        assert_eq!(ranges, [0..7, 8..12, 20..21]);
    }

    #[test]
    fn nothing_stays_nothing() {
        let mut ranges = Vec::new();
        merge(&mut ranges);
        assert!(ranges.is_empty());
    }
}
