//! Sources and population orders that Python supplies: the queues at which its threads wait. The engine's threads never call it.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use latepage::pager::{Following, Pager as Engine};
use latepage::source::queue::{Contents, RequestQueue, Terms};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::{Place, raise};
use crate::session::Session;

/// A source that Python's threads answer for. `latepage.CallbackSource` has them.
#[pyclass(frozen, module = "latepage._core")]
pub(crate) struct CallbackSource {
    pub(crate) queue: Arc<RequestQueue>,
}

#[pymethods]
impl CallbackSource {
    #[new]
    fn new(name: String, size: u64, threads: usize, batch: u64, time_limit: Option<f64>) -> PyResult<Self> {
        let limit = time_limit
            .map(Duration::try_from_secs_f64)
            .transpose()
            .map_err(|error| PyValueError::new_err(format!("time_limit: {error}")))?;
        Ok(Self { queue: RequestQueue::new(Terms { name, size, threads, batch, limit }) })
    }

    /// Bytes of guest memory that it holds.
    #[getter]
    fn size(&self) -> u64 {
        self.queue.terms().size
    }

    fn describe(&self) -> String {
        self.queue.terms().name.clone()
    }

    /// Whether some pager, or a hold, needs its threads.
    #[getter]
    fn open(&self) -> bool {
        self.queue.is_open()
    }

    fn hold(&self) {
        self.queue.hold();
    }

    fn release(&self) {
        self.queue.release();
    }

    fn hire(&self) -> bool {
        self.queue.hire()
    }

    fn dismiss(&self) {
        self.queue.dismiss();
    }

    fn retire(&self) {
        self.queue.retire();
    }

    /// Waits for a call: its number, offset and length. `None`: the thread may go.
    fn take(&self, py: Python<'_>) -> Option<(u64, u64, u64)> {
        py.detach(|| self.queue.take()).map(|call| (call.id, call.offset, call.length))
    }

    /// Returns whether someone still waited for it.
    fn answer(&self, py: Python<'_>, call: u64, contents: Option<&[u8]>) -> PyResult<bool> {
        py.detach(|| {
            let contents = contents.map_or(Contents::Zero, |bytes| Contents::Bytes(bytes.to_vec()));
            self.queue.answer(call, contents)
        })
        .map_err(|wrong| raise(py, "SourceError", &wrong.to_string(), &Place::default()))
    }

    /// Returns whether someone still waited for it.
    fn fail(&self, py: Python<'_>, call: u64, reason: &str) -> bool {
        py.detach(|| self.queue.fail(call, reason))
    }
}

/// A page that a fault asked for: its index, why it stands in the trace, and when in ns.
type Entry = (u32, &'static str, u64);

/// What the VMs of a socket touch, for a population order of Python's.
#[pyclass(frozen, module = "latepage._core")]
pub(crate) struct Follower {
    pub(crate) following: Arc<Following>,
    /// Not kept alive by a thread that waits here.
    pub(crate) engine: OnceLock<Weak<Engine>>,
}

#[pymethods]
impl Follower {
    #[new]
    fn new() -> Self {
        Self { following: Following::new(), engine: OnceLock::new() }
    }

    /// Waits for a VM that has started or touched something. `None`: it is over.
    fn next(&self, py: Python<'_>) -> Option<(Session, Vec<Entry>)> {
        let touched = py.detach(|| self.following.next())?;
        let engine = self.engine.get()?.upgrade()?;
        let entries = touched.entries.iter().map(|entry| (entry.page, entry.reason.name(), entry.ns));
        Some((Session::new(touched.session, engine), entries.collect()))
    }

    /// Has ranges brought next, and returns those that are not in the VM's memory.
    fn populate(&self, py: Python<'_>, session: &Session, ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
        let (mut pages, mut outside) = (Vec::new(), Vec::new());
        for (offset, size) in ranges {
            match session.find_pages(offset, size) {
                Ok(found) => pages.extend(found),
                Err(_) => outside.push((offset, size)),
            }
        }
        if let Some(engine) = self.engine.get().and_then(Weak::upgrade) {
            py.detach(|| engine.populate_next(&self.following, session.served(), pages));
        }
        outside
    }

    /// Tells of something among the pager's events.
    fn warn(&self, py: Python<'_>, what: String) {
        if let Some(engine) = self.engine.get().and_then(Weak::upgrade) {
            py.detach(|| engine.warn(what));
        }
    }

    fn dismiss(&self, py: Python<'_>, session: &Session) {
        py.detach(|| self.following.dismiss(session.served()));
    }

    fn end(&self, py: Python<'_>) {
        py.detach(|| self.following.end());
    }
}
