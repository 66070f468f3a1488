//! How long faults waited, apart by what they found and what came of them: for dashboards, which want few numbers.

use std::array;

use crate::memory::atomic::{AtomicU64, Ordering};

/// What kind of page a fault met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageClass {
    /// Its contents came from the source.
    Source,
    /// It is zero: a hole, zero contents, or discarded before.
    Zero,
    /// The guest had it already.
    Resident,
    /// Nobody got to know.
    Unknown,
}

impl PageClass {
    /// Its name, as in metrics and docs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Zero => "zero",
            Self::Resident => "resident",
            Self::Unknown => "unknown",
        }
    }
}

/// What came of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FaultResult {
    /// The page was installed at once.
    Installed,
    /// It was installed after a wait: for the source, or until the kernel took it.
    Deferred,
    /// It was there: only who waited had to be released.
    Present,
    /// The guest discarded it while the fault waited.
    Discarded,
    /// It could not be had.
    Failed,
}

impl FaultResult {
    /// Its name, as in metrics and docs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Installed => "installed",
            Self::Deferred => "deferred",
            Self::Present => "present",
            Self::Discarded => "discarded",
            Self::Failed => "failed",
        }
    }
}

/// The combinations that occur. Only they have a histogram.
const CELLS: [(PageClass, FaultResult); 8] = [
    (PageClass::Source, FaultResult::Installed),
    (PageClass::Source, FaultResult::Deferred),
    (PageClass::Zero, FaultResult::Installed),
    (PageClass::Zero, FaultResult::Deferred),
    (PageClass::Zero, FaultResult::Discarded),
    (PageClass::Resident, FaultResult::Present),
    (PageClass::Unknown, FaultResult::Discarded),
    (PageClass::Unknown, FaultResult::Failed),
];

const LOWEST_POWER: u32 = 10;
const HIGHEST_POWER: u32 = 36;

/// How many bounds there are: 2^10 ns (about a microsecond) to 2^36 ns (68.7 s), each twice the one before.
pub const BOUNDS: usize = (HIGHEST_POWER - LOWEST_POWER) as usize + 1;

/// The upper bound of a bucket, in ns; what took exactly that long counts in it.
pub const fn bound(bucket: usize) -> u64 {
    1 << (LOWEST_POWER + bucket as u32)
}

/// The bucket of a duration in ns; [`BOUNDS`] for what is above them all.
fn bucket_of(ns: u64) -> usize {
    // The power of two that it does not exceed.
    let power = u64::BITS - ns.saturating_sub(1).leading_zeros();
    (power.saturating_sub(LOWEST_POWER) as usize).min(BOUNDS)
}

#[derive(Debug)]
struct Cell {
    buckets: [AtomicU64; BOUNDS + 1],
    sum: AtomicU64,
}

/// How long faults waited, in ns, by page class and result. Any thread may record, none waits; 1.8 KiB.
#[derive(Debug)]
pub struct FaultsByClass {
    cells: Box<[Cell; CELLS.len()]>,
}

impl FaultsByClass {
    /// Nothing yet.
    pub fn new() -> Self {
        let cell = |_| Cell { buckets: array::from_fn(|_| AtomicU64::new(0)), sum: AtomicU64::new(0) };
        Self { cells: Box::new(array::from_fn(cell)) }
    }

    /// Counts a fault that waited for `ns`.
    #[inline]
    pub fn record(&self, class: PageClass, result: FaultResult, ns: u64) {
        // What does not occur is counted as what it comes nearest to: nothing is lost.
        let at = CELLS.iter().position(|cell| *cell == (class, result)).unwrap_or(CELLS.len() - 1);
        let cell = &self.cells[at];
        cell.buckets[bucket_of(ns)].fetch_add(1, Ordering::Relaxed);
        cell.sum.fetch_add(ns, Ordering::Relaxed);
    }

    /// The counts now, as plain numbers.
    pub fn snapshot(&self) -> FaultsByClassSnapshot {
        let cell = |at: usize| CellSnapshot {
            buckets: array::from_fn(|bucket| self.cells[at].buckets[bucket].load(Ordering::Relaxed)),
            sum: self.cells[at].sum.load(Ordering::Relaxed),
        };
        FaultsByClassSnapshot { cells: array::from_fn(cell) }
    }
}

impl Default for FaultsByClass {
    fn default() -> Self {
        Self::new()
    }
}

/// One combination's histogram, as plain numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CellSnapshot {
    /// How many faults took longer than the bound before, and no longer than [`bound`]; the last one: longer than all bounds.
    pub buckets: [u64; BOUNDS + 1],
    /// All their waits together, in ns.
    pub sum: u64,
}

/// The histograms of all combinations, as plain numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FaultsByClassSnapshot {
    cells: [CellSnapshot; CELLS.len()],
}

impl FaultsByClassSnapshot {
    /// Each combination that can occur, with its histogram.
    pub fn iter(&self) -> impl Iterator<Item = (PageClass, FaultResult, &CellSnapshot)> {
        CELLS.iter().zip(&self.cells).map(|((class, result), cell)| (*class, *result, cell))
    }

    /// Adds another session's.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.cells.iter_mut().zip(&other.cells) {
            for (mine, theirs) in mine.buckets.iter_mut().zip(&theirs.buckets) {
                *mine = mine.saturating_add(*theirs);
            }
            mine.sum = mine.sum.saturating_add(theirs.sum);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_duration_counts_in_the_first_bucket_whose_bound_it_does_not_exceed() {
        for bucket in 1..BOUNDS {
            let bound = bound(bucket);
            assert_eq!(bucket_of(bound), bucket);
            assert_eq!(bucket_of(bound + 1), bucket + 1);
            assert_eq!(bucket_of(bound / 2 + 1), bucket);
        }
        assert_eq!([bucket_of(0), bucket_of(1), bucket_of(1024)], [0; 3]);
        assert_eq!(bucket_of(u64::MAX), BOUNDS);
    }

    #[test]
    fn faults_are_counted_apart_and_merged_alike() {
        let (first, second) = (FaultsByClass::new(), FaultsByClass::new());
        first.record(PageClass::Zero, FaultResult::Installed, 2000);
        second.record(PageClass::Zero, FaultResult::Installed, 3000);
        second.record(PageClass::Unknown, FaultResult::Failed, u64::MAX / 2);
        let mut both = first.snapshot();
        both.merge(&second.snapshot());
        let counted: Vec<_> = both
            .iter()
            .filter(|(_, _, cell)| cell.buckets.iter().any(|count| *count > 0))
            .map(|(class, result, cell)| {
                (class.name(), result.name(), cell.buckets.iter().sum::<u64>(), cell.sum)
            })
            .collect();
        assert_eq!(counted, [("zero", "installed", 2, 5000), ("unknown", "failed", 1, u64::MAX / 2)]);
    }
}
