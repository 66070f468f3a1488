//! Statistics, as plain tuples and dicts: `latepage.stats` gives them their types.

use latepage::stats::{BOUNDS, StatsSnapshot, bound};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// How many faults, and in ns: their mean, median, 99th percentile and maximum.
type LatencyFields = (u64, f64, u64, u64, u64);

/// A page class, a result, how many faults took no longer than each bound, how many in all, and the sum of their waits in ns.
type ClassFields = (&'static str, &'static str, Vec<u64>, u64, u64);

/// Counters, latency, and latency by class and result.
pub(crate) type StatsFields<'py> = (Bound<'py, PyDict>, LatencyFields, Vec<ClassFields>);

/// The upper bounds of the histograms by class, in ns.
pub(crate) fn bounds() -> Vec<u64> {
    (0..BOUNDS).map(bound).collect()
}

/// The fields of a snapshot.
pub(crate) fn to_python<'py>(py: Python<'py>, stats: &StatsSnapshot) -> PyResult<StatsFields<'py>> {
    let counters = PyDict::new(py);
    for (name, count) in stats.counters.iter() {
        counters.set_item(name, count)?;
    }
    let latency = &stats.latency;
    let latency = (latency.count, latency.mean(), latency.quantile(0.5), latency.quantile(0.99), latency.max);
    let classes = stats.by_class.iter().map(|(class, result, cell)| {
        let mut seen = 0;
        let cumulative = cell.buckets[..BOUNDS].iter().map(|count| {
            seen += count;
            seen
        });
        let cumulative: Vec<u64> = cumulative.collect();
        (class.name(), result.name(), cumulative, cell.buckets.iter().sum(), cell.sum)
    });
    Ok((counters, latency, classes.collect()))
}
