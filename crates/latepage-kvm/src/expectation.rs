//! What every fingerprint page should hold.
//!
//! A page's contents follow from its history: the seeds that were written to it, in their order, since it was last zero. Pages
//! of the same history are of one class; the class is one byte a page, and the guest's verify reads the same table.

use serde::{Deserialize, Serialize};

use crate::fingerprint::spread;

/// The class of pages that hold zeros.
const ZERO: u8 = 0;

/// There are 255 different histories already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooManyHistories;

/// The history of every page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expectations {
    histories: Vec<Vec<u64>>,
    classes: Vec<u8>,
}

/// Expectations as the state file has them: histories, and runs of [pages, class].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedExpectations {
    histories: Vec<Vec<u64>>,
    runs: Vec<(u64, u8)>,
}

impl Expectations {
    /// All pages zero.
    pub(crate) fn new(pages: u64) -> Self {
        Self { histories: vec![Vec::new()], classes: vec![ZERO; pages as usize] }
    }

    /// The seeds written to a page since it was last zero.
    pub(crate) fn history(&self, page: u64) -> &[u64] {
        &self.histories[usize::from(self.classes[page as usize])]
    }

    /// The class of every page.
    pub(crate) fn classes(&self) -> &[u8] {
        &self.classes
    }

    /// The one class that all pages have, if it is one.
    pub(crate) fn uniform(&self) -> Option<u8> {
        let first = *self.classes.first()?;
        self.classes.iter().all(|class| *class == first).then_some(first)
    }

    /// The number that the guest checks a class with: its last seed, spread, or 0 for zeros.
    pub(crate) fn spread_seed(&self, class: u8) -> u64 {
        self.histories
            .get(usize::from(class))
            .and_then(|history| history.last())
            .map_or(0, |seed| spread(*seed))
    }

    /// The pages are zero from now on.
    pub(crate) fn zero(&mut self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            self.classes[page as usize] = ZERO;
        }
    }

    /// `seed` is written to the pages.
    pub(crate) fn write(
        &mut self,
        pages: impl IntoIterator<Item = u64>,
        seed: u64,
    ) -> Result<(), TooManyHistories> {
        let mut becomes = [None; 256];
        for page in pages {
            let class = self.classes[page as usize];
            let next = match becomes[usize::from(class)] {
                Some(next) => next,
                None => {
                    let next = self.class_after(class, seed)?;
                    // A class that is used again means something else from now on.
                    becomes[usize::from(next)] = None;
                    becomes[usize::from(class)] = Some(next);
                    next
                }
            };
            self.classes[page as usize] = next;
        }
        Ok(())
    }

    fn class_after(&mut self, class: u8, seed: u64) -> Result<u8, TooManyHistories> {
        // Words of an earlier write of the same seed lie where the new ones go.
        let mut history: Vec<u64> =
            self.histories[usize::from(class)].iter().copied().filter(|past| *past != seed).collect();
        history.push(seed);
        if let Some(known) = self.histories.iter().position(|other| *other == history) {
            return Ok(known as u8);
        }
        if self.histories.len() <= usize::from(u8::MAX) {
            self.histories.push(history);
            return Ok((self.histories.len() - 1) as u8);
        }
        // The class that this very write is leaving still counts as used: some of its pages may not have been visited yet.
        let mut used = [false; 256];
        self.classes.iter().for_each(|class| used[usize::from(*class)] = true);
        let free = (1..256).find(|at| !used[*at]).ok_or(TooManyHistories)?;
        self.histories[free] = history;
        Ok(free as u8)
    }

    /// How many pages hold the last write of which seed: (seed, or none for zero, pages).
    pub(crate) fn summary(&self) -> Vec<(Option<u64>, u64)> {
        let mut pages = [0u64; 256];
        self.classes.iter().for_each(|class| pages[usize::from(*class)] += 1);
        let mut summary: Vec<(Option<u64>, u64)> = Vec::new();
        for (history, pages) in self.histories.iter().zip(pages).filter(|(_, pages)| *pages > 0) {
            let seed = history.last().copied();
            match summary.iter_mut().find(|(known, _)| *known == seed) {
                Some((_, sum)) => *sum += pages,
                None => summary.push((seed, pages)),
            }
        }
        summary
    }

    /// For the state file.
    pub(crate) fn save(&self) -> SavedExpectations {
        let runs =
            self.classes.chunk_by(|one, next| one == next).map(|run| (run.len() as u64, run[0])).collect();
        SavedExpectations { histories: self.histories.clone(), runs }
    }

    /// From the state file of a VM with `pages` pages.
    pub(crate) fn restore(saved: SavedExpectations, pages: u64) -> Result<Self, String> {
        let SavedExpectations { histories, runs } = saved;
        if histories.is_empty() || histories.len() > 256 || !histories[0].is_empty() {
            return Err("its histories must begin with the empty one and be 256 at most".into());
        }
        if runs.iter().map(|run| run.0).fold(0u64, u64::saturating_add) != pages {
            return Err(format!("its runs of pages do not add up to {pages}"));
        }
        if runs.iter().any(|run| usize::from(run.1) >= histories.len()) {
            return Err("a run of pages has a class without a history".into());
        }
        let classes =
            runs.iter().flat_map(|(count, class)| std::iter::repeat_n(*class, *count as usize)).collect();
        Ok(Self { histories, classes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histories_follow_writes_and_discards() {
        let mut pages = Expectations::new(10);
        pages.write(0..10, 7).unwrap();
        assert!(pages.uniform().is_some());
        pages.write([2, 3], 8).unwrap();
        pages.zero([3, 4]);
        pages.write([4], 8).unwrap();
        assert_eq!(pages.history(1), [7]);
        assert_eq!(pages.history(2), [7, 8]);
        assert!(pages.history(3).is_empty());
        assert_eq!(pages.history(4), [8]);
        assert_eq!(pages.uniform(), None);
        assert_eq!(pages.summary(), [(None, 1), (Some(7), 7), (Some(8), 2)]);
    }

    #[test]
    fn writing_a_seed_again_keeps_one_of_it() {
        let mut pages = Expectations::new(1);
        for seed in [1, 2, 1, 1] {
            pages.write([0], seed).unwrap();
        }
        assert_eq!(pages.history(0), [2, 1]);
    }

    #[test]
    fn classes_nobody_has_are_used_again_and_too_many_are_refused() {
        let mut pages = Expectations::new(300);
        for seed in 0..1000 {
            pages.write([0], seed).unwrap();
            pages.zero([0]);
        }
        let outcome: Result<Vec<()>, _> = (0..300).map(|page| pages.write([page], page)).collect();
        assert_eq!(outcome, Err(TooManyHistories));
    }

    #[test]
    fn they_survive_the_state_file() {
        let mut pages = Expectations::new(100);
        pages.write(10..90, 5).unwrap();
        pages.write((0..100).step_by(3), 6).unwrap();
        assert_eq!(Expectations::restore(pages.save(), 100), Ok(pages.clone()));
        assert!(Expectations::restore(pages.save(), 99).is_err());
    }
}
