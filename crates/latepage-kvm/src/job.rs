//! Jobs: what a guest is asked to do, and what came of it.

use serde::{Deserialize, Serialize};

use crate::guest::order::{Order, Walk};
use crate::layout::{GuestLayout, LIST_LIMIT};

/// Wrong pages that are reported by number; beyond them they are only counted.
pub const WRONG_LISTED: usize = 64;

/// What the guest does with each page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Writes the fingerprint of the job's seed to all pages.
    Fill,
    /// Writes the fingerprint of the job's seed to the pages given.
    Dirty,
    /// Checks that each page holds what was written to it last, or zeros.
    Verify,
    /// Reads one word of each page.
    Touch,
    /// Puts the first byte of each page out by a string instruction: KVM itself reads it, and the host compares it.
    Say,
    /// Counts for ever and touches nothing.
    Count,
}

impl Action {
    /// Whether it changes pages.
    pub(crate) fn writes(self) -> bool {
        matches!(self, Self::Fill | Self::Dirty)
    }
}

/// A job for the whole VM: its vCPUs divide the pages between them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// What to do.
    pub action: Action,
    /// The fingerprint to write, and with it the order drawn at random.
    #[serde(default)]
    pub seed: u64,
    /// In which order each vCPU goes over its slice.
    #[serde(default)]
    pub order: Order,
    /// The pages, as [first, count], in the order given; all if there are none given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<Vec<(u64, u64)>>,
    /// A mark of progress is set every so many pages; a tenth of all if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress_every: Option<u64>,
}

impl Job {
    /// A job over all pages.
    pub fn new(action: Action, seed: u64, order: Order) -> Self {
        Self { action, seed, order, pages: None, progress_every: None }
    }

    /// The same job over given pages, as [first, count].
    #[must_use]
    pub fn over(self, pages: Vec<(u64, u64)>) -> Self {
        Self { pages: Some(pages), ..self }
    }

    /// Checks it against a VM's memory.
    ///
    /// # Errors
    /// Why it cannot be run.
    pub(crate) fn check(&self, layout: &GuestLayout) -> Result<(), String> {
        match (self.action, &self.pages) {
            (Action::Fill, Some(_)) => {
                return Err("a fill is of all pages; `dirty` writes to given ones".into());
            }
            (Action::Dirty, None) => return Err("`dirty` needs the pages to write to".into()),
            (Action::Count, Some(_)) => return Err("`count` touches no pages".into()),
            _ => {}
        }
        let Some(ranges) = &self.pages else { return Ok(()) };
        let mut sum = 0u64;
        for &(first, count) in ranges {
            if count == 0 || first.checked_add(count).is_none_or(|end| end > layout.pages()) {
                return Err(format!(
                    "pages {first}+{count} are not all among the VM's {} pages",
                    layout.pages()
                ));
            }
            sum += count;
            if sum > LIST_LIMIT {
                return Err(format!("a list holds {LIST_LIMIT} pages at most; run it in parts"));
            }
        }
        if sum == 0 {
            return Err("its list of pages is empty".into());
        }
        Ok(())
    }

    /// The pages of a job over given pages, in the order in which the guest gets them: each vCPU's slice in the job's order.
    pub(crate) fn list(&self, vcpus: usize) -> Option<Vec<u32>> {
        let ranges = self.pages.as_ref()?;
        let given: Vec<u32> =
            ranges.iter().flat_map(|&(first, count)| first..first + count).map(|page| page as u32).collect();
        let ordered = slices(given.len() as u64, vcpus).flat_map(|(first, count)| {
            Walk::new(self.order, self.seed, count).map(move |at| (first + at) as usize)
        });
        Some(ordered.map(|at| given[at]).collect())
    }

    /// How many pages it visits; 0 for one that counts.
    pub(crate) fn size(&self, layout: &GuestLayout) -> u64 {
        match (&self.pages, self.action) {
            (_, Action::Count) => 0,
            (Some(ranges), _) => ranges.iter().map(|range| range.1).sum(),
            (None, _) => layout.pages(),
        }
    }

    /// The pages that it writes to.
    pub(crate) fn written(&self, layout: &GuestLayout) -> Vec<(u64, u64)> {
        match (&self.pages, self.action.writes()) {
            (_, false) => Vec::new(),
            (Some(ranges), true) => ranges.clone(),
            (None, true) => vec![(0, layout.pages())],
        }
    }
}

/// `count` things divided between `parts`: (first, count) for each.
pub(crate) fn slices(count: u64, parts: usize) -> impl Iterator<Item = (u64, u64)> {
    let parts = parts as u64;
    (0..parts).map(move |part| {
        let edge = |part: u64| (u128::from(count) * u128::from(part) / u128::from(parts)) as u64;
        (edge(part), edge(part + 1) - edge(part))
    })
}

/// What has come of a job. Times are nanoseconds of CLOCK_MONOTONIC since the VM began to be created or restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobReport {
    /// The job.
    pub job: Job,
    /// Pages that it visits in all.
    pub pages: u64,
    /// Pages visited; for `count`, how far it counted.
    pub done: u64,
    /// Pages that were not what they should be.
    pub wrong_pages: u64,
    /// Their numbers, the first [`WRONG_LISTED`] of them.
    pub wrong: Vec<u64>,
    /// Pages found changed because they were discarded while the job ran, and which did read as zero.
    pub superseded: u64,
    /// When it started.
    pub started_ns: u64,
    /// When its last vCPU was done.
    pub ended_ns: Option<u64>,
    /// (pages done, when).
    pub marks: Vec<(u64, u64)>,
}

impl JobReport {
    /// Whether it is over and found nothing wrong.
    pub fn is_right(&self) -> bool {
        self.ended_ns.is_some() && self.wrong_pages == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_everything_once() {
        for (count, parts) in [(0, 1), (10, 3), (3, 8), (1 << 40, 64)] {
            let slices: Vec<_> = slices(count, parts).collect();
            assert_eq!(slices.len(), parts);
            let end = slices.iter().fold(0, |at, (first, count)| {
                assert_eq!(*first, at);
                at + count
            });
            assert_eq!(end, count);
        }
    }

    #[test]
    fn impossible_jobs_say_why() {
        let layout = GuestLayout::new(8 << 20, false).unwrap();
        let check = |job: Job| job.check(&layout).unwrap_err();
        let verify = || Job::new(Action::Verify, 0, Order::Random);
        assert!(check(verify().over(vec![(1530, 7)])).contains("1530+7"));
        assert!(check(verify().over(vec![(u64::MAX, 2)])).contains("not all"));
        assert!(check(verify().over(vec![])).contains("empty"));
        assert!(check(Job::new(Action::Dirty, 1, Order::Random)).contains("needs the pages"));
        assert!(check(Job::new(Action::Fill, 1, Order::Random).over(vec![(0, 1)])).contains("dirty"));
        assert_eq!(verify().over(vec![(1530, 6)]).check(&layout), Ok(()));
    }

    #[test]
    fn a_list_has_every_page_once() {
        let job = Job::new(Action::Touch, 9, Order::Random).over(vec![(100, 50), (3, 1)]);
        let mut list = job.list(4).unwrap();
        list.sort_unstable();
        assert_eq!(list, std::iter::once(3).chain(100..150).collect::<Vec<u32>>());
    }
}
