//! How long it is from the end of one batch of faults to the next: what a worker would have had to spin for.

use std::time::Duration;

use crate::memory::atomic::{AtomicU64, Ordering};

/// Upper ends of the buckets in ns; the last bucket has none.
const ENDS: [u64; 6] = [5_000, 10_000, 20_000, 50_000, 100_000, 200_000];

/// What a sleep and the wake from another core cost, in ns: about that on the machines that docs/performance.md shows.
const SLEEP: u64 = 40_000;

/// Pauses between faults, counted by their length.
#[derive(Debug, Default)]
pub struct Gaps {
    counts: [AtomicU64; ENDS.len() + 1],
}

impl Gaps {
    /// Counts a pause of `ns`.
    #[inline]
    pub fn record(&self, ns: u64) {
        let bucket = ENDS.iter().position(|end| ns <= *end).unwrap_or(ENDS.len());
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts as plain numbers.
    pub fn snapshot(&self) -> GapsSnapshot {
        GapsSnapshot { counts: std::array::from_fn(|bucket| self.counts[bucket].load(Ordering::Relaxed)) }
    }
}

/// Pauses between faults as plain numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GapsSnapshot {
    /// Pauses of up to 5, 10, 20, 50, 100 and 200 µs, and longer ones.
    pub counts: [u64; ENDS.len() + 1],
}

impl GapsSnapshot {
    /// Those that came after another snapshot.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            counts: std::array::from_fn(|bucket| self.counts[bucket].saturating_sub(earlier.counts[bucket])),
        }
    }

    /// How long it would have paid to spin before sleeping; zero where it would not have.
    pub fn spin_that_pays(&self) -> Duration {
        let all: u64 = self.counts.iter().sum();
        let cost = |spin: usize| -> u64 {
            // What is caught is waited for; what is not costs the whole spin and a sleep as well.
            let caught: u64 = (0..=spin).map(|bucket| self.counts[bucket] * ENDS[bucket]).sum();
            let missed = all - self.counts[..=spin].iter().sum::<u64>();
            caught + missed * (ENDS[spin] + SLEEP)
        };
        let best = (0..ENDS.len()).min_by_key(|spin| cost(*spin)).unwrap_or(0);
        if cost(best) < all * SLEEP { Duration::from_nanos(ENDS[best]) } else { Duration::ZERO }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_counted_by_length() {
        let gaps = Gaps::default();
        for ns in [0, 5_000, 5_001, 60_000, 200_001, u64::MAX] {
            gaps.record(ns);
        }
        let snapshot = gaps.snapshot();
        assert_eq!(snapshot.counts, [2, 1, 0, 0, 1, 0, 2]);
        gaps.record(1);
        assert_eq!(gaps.snapshot().since(&snapshot).counts, [1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn spinning_pays_where_the_next_fault_comes_soon() {
        let spin = |counts| GapsSnapshot { counts }.spin_that_pays();
        assert_eq!(spin([0; 7]), Duration::ZERO);
        assert_eq!(spin([100, 0, 0, 0, 0, 0, 0]), Duration::from_micros(5));
        assert_eq!(spin([0, 0, 100, 0, 0, 0, 1]), Duration::from_micros(20));
        assert_eq!(spin([0, 0, 0, 0, 0, 0, 100]), Duration::ZERO);
        assert_eq!(spin([0, 0, 0, 0, 0, 100, 0]), Duration::ZERO, "longer than a sleep costs");
    }
}
