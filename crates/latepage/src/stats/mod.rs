//! What a session has done and how fast: counters, a latency histogram, and the trace of which pages came when and why.
//!
//! Everything in here allocates nothing while it records, and may be read while it is written, without a lock. So is recording; only those
//! who record in the trace of a session with several shards take turns ([`TraceRing::shared`]).

mod by_class;
mod counters;
mod gaps;
mod histogram;
mod trace;

pub use by_class::{
    BOUNDS, CellSnapshot, FaultResult, FaultsByClass, FaultsByClassSnapshot, PageClass, bound,
};
pub use counters::{Counter, Counters, CountersSnapshot};
pub use gaps::{Gaps, GapsSnapshot};
pub use histogram::{BUCKETS, Histogram, HistogramSnapshot, bucket_range};
pub use trace::{Reason, TraceEntry, TraceRead, TraceRing};

#[cfg(all(test, not(loom)))]
mod properties;
#[cfg(all(test, loom))]
mod races;

/// The statistics of one session.
#[derive(Debug)]
pub struct Stats {
    /// What was done, and how often.
    pub counters: Counters,
    /// How long faults took from the moment that they were delivered to us to their release, in ns.
    pub latency: Histogram,
    /// The same, coarser, by page class and result.
    pub by_class: FaultsByClass,
    /// How long it was from one batch of faults to the next.
    pub gaps: Gaps,
    /// Which pages came in, in what order, when and why.
    pub trace: TraceRing,
}

impl Stats {
    /// Statistics of which nothing has happened yet, with a trace of the last `trace_capacity` events (16 bytes each; 0 for none).
    pub fn new(trace_capacity: usize) -> Self {
        Self {
            counters: Counters::default(),
            latency: Histogram::new(),
            by_class: FaultsByClass::new(),
            gaps: Gaps::default(),
            trace: TraceRing::new(trace_capacity),
        }
    }

    /// The same, for a session of which several threads may serve a part at the same time.
    pub fn shared(trace_capacity: usize) -> Self {
        Self { trace: TraceRing::shared(trace_capacity), ..Self::new(0) }
    }

    /// Counts a fault whose wait of `ns` is over.
    #[inline]
    pub fn released(&self, class: PageClass, result: FaultResult, ns: u64) {
        self.latency.record(ns);
        self.by_class.record(class, result, ns);
    }

    /// The counters and the histograms as plain numbers. Taken while others record, so that they may differ by what is under way.
    pub fn snapshot(&self) -> StatsSnapshot {
        StatsSnapshot {
            counters: self.counters.snapshot(),
            latency: self.latency.snapshot(),
            by_class: self.by_class.snapshot(),
        }
    }
}

/// Statistics as plain numbers: of one session, or of several that were merged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StatsSnapshot {
    /// What was done, and how often.
    pub counters: CountersSnapshot,
    /// How long faults took, in ns.
    pub latency: HistogramSnapshot,
    /// The same by page class and result.
    pub by_class: FaultsByClassSnapshot,
}

impl StatsSnapshot {
    /// Adds another session's, so that this is the sum of both.
    pub fn merge(&mut self, other: &Self) {
        self.counters.merge(&other.counters);
        self.latency.merge(&other.latency);
        self.by_class.merge(&other.by_class);
    }
}
