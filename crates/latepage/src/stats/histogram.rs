//! A latency histogram of fixed size: sixteen buckets to each power of two of nanoseconds.

use std::ops::Range;

use crate::memory::atomic::{AtomicU64, Ordering};

/// 128 ns: nothing that we time is faster.
const LOWEST_POWER: u32 = 7;
/// 2^36 ns, 68.7 s: what takes longer is a stall, and reported by name.
const HIGHEST_POWER: u32 = 36;
const SUB_BITS: u32 = 4;
const SUB_BUCKETS: usize = 1 << SUB_BITS;

/// How many buckets a histogram has.
pub const BUCKETS: usize = (HIGHEST_POWER - LOWEST_POWER) as usize * SUB_BUCKETS;

/// The bucket that counts this many nanoseconds; what lies outside the range goes to the first or the last one.
fn bucket_of(ns: u64) -> usize {
    let ns = ns.clamp(1 << LOWEST_POWER, (1 << HIGHEST_POWER) - 1);
    let power = ns.ilog2();
    let sub = (ns >> (power - SUB_BITS)) as usize & (SUB_BUCKETS - 1);
    (power - LOWEST_POWER) as usize * SUB_BUCKETS + sub
}

/// The nanoseconds that a bucket counts: its start, and one past its end. The first bucket also counts all below it, the last all
/// above.
///
/// # Panics
/// Where there is no such bucket.
pub fn bucket_range(bucket: usize) -> Range<u64> {
    assert!(bucket < BUCKETS, "bucket {bucket} of {BUCKETS}");
    let width = 1 << (LOWEST_POWER + (bucket / SUB_BUCKETS) as u32 - SUB_BITS);
    let start = width * (SUB_BUCKETS + bucket % SUB_BUCKETS) as u64;
    start..start + width
}

/// Counts durations in nanoseconds. Any thread may record, none waits.
///
/// Log-linear from 128 ns to 2^36 ns (68.7 s): a bucket is at most a sixteenth as wide as its start, so a quantile is at most that
/// much above the duration that was recorded. Takes 3.7 KiB.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
    max: AtomicU64,
}

impl Histogram {
    /// An empty histogram.
    pub fn new() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }

    /// Counts one duration, in ns.
    #[inline]
    pub fn record(&self, ns: u64) {
        self.buckets[bucket_of(ns)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(ns, Ordering::Relaxed);
        // Mostly it is not the longest yet, and then a load leaves the cache line shared.
        if ns > self.max.load(Ordering::Relaxed) {
            self.max.fetch_max(ns, Ordering::Relaxed);
        }
    }

    /// The counts now, as plain numbers. What others record meanwhile may be in the sum and not yet in a bucket, or the reverse.
    pub fn snapshot(&self) -> HistogramSnapshot {
        let buckets: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        HistogramSnapshot {
            count: buckets.iter().sum(),
            buckets,
            sum: self.sum.load(Ordering::Relaxed),
            max: self.max.load(Ordering::Relaxed),
        }
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

/// A histogram as plain numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistogramSnapshot {
    /// How many durations fell into each bucket; [`bucket_range`] says which those are. Always [`BUCKETS`] long.
    pub buckets: Vec<u64>,
    /// How many durations there are: the sum of the buckets.
    pub count: u64,
    /// All durations together, in ns.
    pub sum: u64,
    /// The longest duration, in ns, exactly as it was recorded.
    pub max: u64,
}

impl HistogramSnapshot {
    /// The duration in ns that a fraction `q` (0 to 1) of all durations do not exceed; 0 where nothing was recorded.
    ///
    /// The upper end of the bucket that it lies in, and never above the longest: no more than a sixteenth above what was recorded,
    /// or at most 135 ns where that was below 128.
    pub fn quantile(&self, q: f64) -> u64 {
        if self.count == 0 {
            return 0;
        }
        let rank = ((q.clamp(0.0, 1.0) * self.count as f64).ceil() as u64).clamp(1, self.count);
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank && bucket < BUCKETS - 1 {
                return (bucket_range(bucket).end - 1).min(self.max);
            }
        }
        self.max
    }

    /// The mean duration in ns; 0 where nothing was recorded.
    pub fn mean(&self) -> f64 {
        match self.count {
            0 => 0.0,
            count => self.sum as f64 / count as f64,
        }
    }

    /// Adds another histogram's counts to these.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine = mine.saturating_add(*theirs);
        }
        self.count = self.count.saturating_add(other.count);
        self.sum = self.sum.saturating_add(other.sum);
        self.max = self.max.max(other.max);
    }
}

impl Default for HistogramSnapshot {
    fn default() -> Self {
        Self { buckets: vec![0; BUCKETS], count: 0, sum: 0, max: 0 }
    }
}
