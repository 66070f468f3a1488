//! Faults that were read together: those that lie side by side come as one run, and a page that came for one of them is not
//! brought again for another.

use std::ops::Range;
use std::time::Instant;

use crate::delivery::Fault;
use crate::stats::PageClass;

/// Pages that came while a batch was served, and what they were.
#[derive(Clone, Debug)]
pub(super) struct Came {
    pages: Range<u32>,
    pub(super) class: PageClass,
    pub(super) at: Instant,
}

/// What came since a batch was read. Each install wakes everyone whose fault had been read before it, so that a fault of the
/// same batch on such a page is over: nothing more is to be done for it.
#[derive(Debug)]
pub(super) struct Fresh {
    came: Vec<Came>,
    /// A batch of one has nobody to ask.
    wanted: bool,
}

impl Fresh {
    /// For batches of so many faults.
    pub(super) fn new(faults: usize) -> Self {
        Self { came: Vec::with_capacity(faults), wanted: false }
    }

    /// Begins a batch of so many faults, all of which have been read.
    pub(super) fn begin(&mut self, faults: usize) {
        self.came.clear();
        self.wanted = faults > 1;
    }

    /// The batch is over: what comes from here on was perhaps not yet read when it came.
    pub(super) fn end(&mut self) {
        self.wanted = false;
        self.came.clear();
    }

    /// Pages have come, and their waiters have been woken.
    pub(super) fn add(&mut self, pages: &Range<u32>, class: PageClass, at: Instant) {
        // Never more than there was room for at the start: what is not kept here is looked at the long way.
        if self.wanted && self.came.len() < self.came.capacity() {
            self.came.push(Came { pages: pages.clone(), class, at });
        }
    }

    /// What this page came with, if it came since the batch was read.
    pub(super) fn find(&self, page: u32) -> Option<&Came> {
        self.came.iter().find(|came| came.pages.contains(&page))
    }
}

/// How many pages directly behind the first fault's other faults of the batch wait for, `most` at most.
pub(super) fn side_by_side(faults: &[Fault], most: u32) -> u32 {
    let Some((first, others)) = faults.split_first() else { return 0 };
    let waited_for = |page: u32| others.iter().any(|fault| fault.page == page);
    (1..=most).take_while(|behind| first.page.checked_add(*behind).is_some_and(waited_for)).count() as u32
}

/// How many pages these are. Ranges that a stranger names may be many, and each as long as all of the memory.
pub(super) fn pages_of(ranges: &[Range<u32>]) -> u64 {
    ranges.iter().map(|pages| u64::from(pages.end - pages.start)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::FaultFlags;

    fn faults(pages: &[u32]) -> Vec<Fault> {
        pages.iter().map(|page| Fault { page: *page, flags: FaultFlags::empty(), thread: 0 }).collect()
    }

    #[test]
    fn faults_side_by_side_are_found_in_any_order() {
        assert_eq!(side_by_side(&faults(&[4]), 16), 0);
        assert_eq!(side_by_side(&faults(&[4, 6, 9, 5, 7, 3]), 16), 3);
        assert_eq!(side_by_side(&faults(&[4, 6, 9, 5, 7, 3]), 2), 2);
        assert_eq!(side_by_side(&faults(&[u32::MAX, 0]), 16), 0);
        assert_eq!(side_by_side(&[], 16), 0);
    }

    #[test]
    fn as_many_pages_as_a_stranger_may_name_are_counted() {
        assert_eq!(pages_of(&vec![0..1 << 26; 64]), 1 << 32);
        assert_eq!(pages_of(&[]), 0);
    }

    #[test]
    fn only_what_came_since_the_batch_was_read_is_fresh() {
        let mut fresh = Fresh::new(2);
        let now = Instant::now();
        fresh.add(&(0..4), PageClass::Source, now);
        assert!(fresh.find(1).is_none(), "before any batch");
        fresh.begin(1);
        fresh.add(&(0..4), PageClass::Source, now);
        assert!(fresh.find(1).is_none(), "nobody asks");
        fresh.begin(3);
        for first in [0, 8, 16] {
            fresh.add(&(first..first + 4), PageClass::Zero, now);
        }
        assert!(fresh.find(3).is_some() && fresh.find(11).is_some());
        assert!(fresh.find(4).is_none() && fresh.find(16).is_none(), "no more than there is room for");
        fresh.end();
        fresh.add(&(0..4), PageClass::Source, now);
        assert!(fresh.find(1).is_none(), "after the batch");
    }
}
