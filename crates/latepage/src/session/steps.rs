//! Walking a run of pages with calls that may stop early.

use std::ops::Range;

use crate::install::{Outcome, Stop};

/// A run of pages, taken in as large steps as the kernel lets us.
///
/// The kernel answers ENOENT for a whole range as soon as it crosses from one mapping of the VMM into another, as where a
/// part of a region was advised apart. Only of a single page does it mean that nothing is there.
pub(super) struct Steps {
    left: Range<u32>,
    size: u32,
}

impl Steps {
    pub(super) fn new(run: Range<u32>) -> Self {
        let size = run.end - run.start;
        Self { left: run, size }
    }

    /// The pages to try now.
    pub(super) fn next(&self) -> Option<Range<u32>> {
        let end = self.left.end.min(self.left.start.saturating_add(self.size.max(1)));
        (!self.left.is_empty()).then_some(self.left.start..end)
    }

    /// Moves on behind what was done, and says what stopped it for good.
    pub(super) fn after(&mut self, outcome: Outcome) -> Option<Stop> {
        let tried = self.next().map_or(0, |step| step.end - step.start) - outcome.pages;
        self.left.start += outcome.pages;
        match outcome.stopped? {
            Stop::Unmapped if tried > 1 => {
                self.size = tried / 2;
                None
            }
            stop => Some(stop),
        }
    }

    /// Leaves the next page out, and names it.
    pub(super) fn skip(&mut self) -> u32 {
        let page = self.left.start;
        self.left.start += 1;
        page
    }

    /// What has not been done.
    pub(super) fn left(&self) -> Range<u32> {
        self.left.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn done(pages: u32) -> Outcome {
        Outcome { pages, stopped: None }
    }

    const fn stopped(pages: u32, stop: Stop) -> Outcome {
        Outcome { pages, stopped: Some(stop) }
    }

    #[test]
    fn a_run_is_tried_whole_and_gone_on_with_after_a_partial_step() {
        let mut steps = Steps::new(10..20);
        assert_eq!(steps.next(), Some(10..20));
        assert_eq!(steps.after(done(4)), None);
        assert_eq!(steps.next(), Some(14..20));
        assert_eq!(steps.after(stopped(2, Stop::Busy)), Some(Stop::Busy));
        assert_eq!(steps.left(), 16..20);
    }

    #[test]
    fn unmapped_is_believed_of_a_single_page_only() {
        let mut steps = Steps::new(0..8);
        for size in [8, 4, 2] {
            assert_eq!(steps.next(), Some(0..size));
            assert_eq!(steps.after(stopped(0, Stop::Unmapped)), None);
        }
        assert_eq!(steps.next(), Some(0..1));
        assert_eq!(steps.after(stopped(0, Stop::Unmapped)), Some(Stop::Unmapped));
        assert_eq!(steps.left(), 0..8);
    }

    #[test]
    fn a_page_that_is_there_is_left_out() {
        let mut steps = Steps::new(0..3);
        assert_eq!(steps.after(stopped(1, Stop::AlreadyThere)), Some(Stop::AlreadyThere));
        assert_eq!(steps.skip(), 1);
        assert_eq!(steps.next(), Some(2..3));
        assert_eq!(steps.after(done(1)), None);
        assert_eq!(steps.next(), None);
    }
}
