//! Sessions, as Python holds them.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use latepage::pager::Pager as Engine;
use latepage::session::{End, Population, Session as Served};
use latepage::stats::TraceEntry;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::{Place, raise};
use crate::stats::{self, StatsFields};
use crate::trace;

/// How long a wait goes on without a look at whether Ctrl-C was pressed.
const SLICE: Duration = Duration::from_millis(200);

type RegionFields = (Option<u64>, u64, u64, u64, u64);

/// One VM that is served, or was.
#[pyclass(frozen, module = "latepage._core")]
pub(crate) struct Session {
    served: Arc<Served>,
    engine: Arc<Engine>,
}

impl Session {
    pub(crate) fn new(served: Arc<Served>, engine: Arc<Engine>) -> Self {
        Self { served, engine }
    }

    fn error(&self, py: Python<'_>, message: &str, address: Option<u64>) -> PyErr {
        raise(
            py,
            "SessionError",
            message,
            &Place { vm: Some(self.served.name()), address, ..Place::default() },
        )
    }

    pub(crate) fn served(&self) -> &Arc<Served> {
        &self.served
    }

    /// The pages that a range of the snapshot covers; it may go over several regions.
    fn pages_of(&self, py: Python<'_>, offset: u64, size: u64) -> PyResult<Vec<Range<u32>>> {
        self.find_pages(offset, size).map_err(|at| {
            self.error(py, &format!("{}: its memory has no offset {at:#x}", self.served.name()), Some(at))
        })
    }

    /// The same; or the first offset that is not in the VM's memory.
    pub(crate) fn find_pages(&self, offset: u64, size: u64) -> Result<Vec<Range<u32>>, u64> {
        let layout = self.served.layout();
        let end = offset.checked_add(size).ok_or(u64::MAX)?;
        let mut found = Vec::new();
        let mut at = offset;
        while at < end {
            let first = layout.find_offset(at).ok_or(at)?;
            let region = &layout.regions()[layout.place(first).region];
            let until = end.min(region.offset + region.size);
            let last = layout.find_offset(until - 1).ok_or(until - 1)?;
            found.push(first..last + 1);
            at = until;
        }
        Ok(found)
    }
}

#[pymethods]
impl Session {
    #[getter]
    fn id(&self) -> u64 {
        self.served.id()
    }

    #[getter]
    fn name(&self) -> &str {
        self.served.name()
    }

    #[getter]
    fn pid(&self) -> u32 {
        self.served.pid().unwrap_or(0)
    }

    #[getter]
    fn form(&self) -> &'static str {
        self.served.form().name()
    }

    #[getter]
    fn backing(&self) -> &'static str {
        self.served.backing().name()
    }

    #[getter]
    fn vcpus(&self) -> u32 {
        self.served.vcpus()
    }

    /// Seconds since it began.
    #[getter]
    fn age(&self) -> f64 {
        self.served.started().elapsed().as_secs_f64()
    }

    #[getter]
    fn closed(&self) -> bool {
        self.served.end().is_some()
    }

    fn regions(&self) -> Vec<RegionFields> {
        let regions = self.served.layout().regions().iter();
        regions.map(|r| (r.gpa, r.hva, r.size, r.offset, r.page_size.bytes())).collect()
    }

    /// How many pages are in each state, in the order of `PAGE_STATES`.
    fn progress(&self, py: Python<'_>) -> Vec<u64> {
        py.detach(|| self.served.pages().count().to_vec())
    }

    fn pages<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let count = self.served.layout().pages();
        let states: Vec<u8> =
            py.detach(|| (0..count).map(|page| self.served.pages().state(page) as u8).collect());
        PyBytes::new(py, &states)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<StatsFields<'py>> {
        stats::to_python(py, &self.served.stats().snapshot())
    }

    #[allow(clippy::type_complexity, reason = "a list of entries as Python has them")]
    fn trace(&self, py: Python<'_>, cursor: u64) -> (Vec<(u32, &'static str, u64, u32)>, u64, u64) {
        let read = py.detach(|| self.served.stats().trace.read_from(cursor));
        let entry = |entry: &TraceEntry| (entry.page, entry.reason.name(), entry.ns, entry.pages);
        let entries = read.entries.iter().map(entry).collect();
        (entries, read.cursor, read.lost)
    }

    /// The trace from a cursor on, as the records of a trace file; where to go on; and how many entries were lost before them.
    fn trace_raw<'py>(&self, py: Python<'py>, cursor: u64) -> (Bound<'py, PyBytes>, u64, u64) {
        let (records, cursor, lost) = py.detach(|| {
            let read = self.served.stats().trace.read_from(cursor);
            (trace::records(&read.entries), read.cursor, read.lost)
        });
        (PyBytes::new(py, &records), cursor, lost)
    }

    /// How many entries its trace keeps.
    #[getter]
    fn trace_capacity(&self) -> usize {
        self.served.stats().trace.capacity()
    }

    /// Why it is over, once it is.
    #[getter]
    fn end(&self) -> Option<&'static str> {
        self.served.end().map(|end| match end {
            End::Gone => "gone",
            End::Detached => "detached",
            End::Closed => "closed",
        })
    }

    /// What its memory comes from.
    #[getter]
    fn source(&self) -> String {
        self.served.source().describe()
    }

    /// Of its policy, what decides which pages come: whether there is population, and within how many bytes a touch may bring
    /// others along.
    #[getter]
    fn bringing(&self) -> (bool, u64) {
        let policy = self.served.policy();
        (policy.population != Population::None, policy.fault_around.reach())
    }

    fn populate(&self, py: Python<'_>, ranges: Option<Vec<(u64, u64)>>) -> PyResult<()> {
        if self.served.end().is_some() {
            return Err(self.error(py, &format!("{}: its session is over", self.served.name()), None));
        }
        let mut pages = Vec::new();
        match ranges {
            None => pages.push(0..self.served.layout().pages()),
            Some(ranges) => {
                for (offset, size) in ranges {
                    pages.extend(self.pages_of(py, offset, size)?);
                }
            }
        }
        py.detach(|| self.engine.populate(&self.served, pages));
        Ok(())
    }

    fn wait_populated(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<bool> {
        // A timeout too far away to be a moment is none.
        let deadline = timeout
            .and_then(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).ok())
            .and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let slice = left.map_or(SLICE, |left| left.min(SLICE));
            if py.detach(|| self.engine.wait_populated(&self.served, Some(slice))) {
                return Ok(true);
            }
            if self.served.end().is_some() {
                let message =
                    format!("{}: its session ended before it had all of its memory", self.served.name());
                return Err(self.error(py, &message, None));
            }
            if left.is_some_and(|left| left <= slice) {
                return Ok(false);
            }
            py.check_signals()?;
        }
    }
}

/// The names of the page states, in the order of their numbers (`latepage::memory::PageState`).
pub(crate) const PAGE_STATES: [&str; 7] =
    ["absent", "in flight", "filled", "present", "removed", "clearing", "failed"];
