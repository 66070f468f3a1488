//! The pager, as Python holds it.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use latepage::pager::{Arrivals as Arrived, Config, Pager as Engine};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::callback::Follower;
use crate::errors::{Place, listen_error, raise};
use crate::session::Session;
use crate::source::{AnySource, Queued};
use crate::stats::{self, StatsFields};
use crate::{events, policy, sys};

/// A pager and its threads, none of which ever calls Python.
#[pyclass(frozen, module = "latepage._core")]
pub(crate) struct Pager {
    engine: Arc<Engine>,
    /// Sources of callbacks that it listens with.
    queues: Mutex<Vec<Queued>>,
}

#[pymethods]
impl Pager {
    #[new]
    #[pyo3(signature = (*, workers=None, io_threads=None, populators=None, realtime=None, nice=None, log=None))]
    fn new(
        py: Python<'_>,
        workers: Option<usize>,
        io_threads: Option<usize>,
        populators: Option<usize>,
        realtime: Option<u8>,
        nice: Option<i8>,
        log: Option<RawFd>,
    ) -> PyResult<Self> {
        let failed = |what: &str, call: &str, errno: Option<i32>| {
            raise(py, "PagerError", what, &Place { call: Some(call), errno, ..Place::default() })
        };
        let log = log.map(sys::duplicate).transpose().map_err(|errno| {
            failed(&format!("log: no such descriptor: {errno}"), "fcntl", Some(errno.raw_os_error()))
        })?;
        let config = Config { workers, readers: io_threads, populators, realtime, nice, io_uring: None, log };
        let engine = py.detach(|| Engine::start(config)).map_err(|error| {
            failed(&format!("the pager's threads cannot start: {error}"), "clone", error.raw_os_error())
        })?;
        Ok(Self { engine: Arc::new(engine), queues: Mutex::new(Vec::new()) })
    }

    #[pyo3(signature = (path, source, policy, follower=None))]
    fn listen(
        &self,
        py: Python<'_>,
        path: PathBuf,
        source: AnySource<'_>,
        policy: &Bound<'_, PyDict>,
        follower: Option<&Follower>,
    ) -> PyResult<()> {
        let policy = policy::from_python(policy)?;
        let (source, queue) = source.for_pager(&self.queues);
        if let Some(follower) = follower {
            // It is made for one socket, and was given to none before.
            let _ = follower.engine.set(Arc::downgrade(&self.engine));
        }
        let listened = py.detach(|| match follower {
            None => self.engine.listen(&path, Arc::clone(&source), policy),
            Some(follower) => {
                let following = Arc::clone(&follower.following);
                self.engine.listen_and_follow(&path, Arc::clone(&source), policy, following)
            }
        });
        if listened.is_ok() {
            self.queues.lock().unwrap_or_else(PoisonError::into_inner).extend(queue);
        }
        listened.map_err(|error| listen_error(py, &error))
    }

    fn sessions(&self) -> Vec<Session> {
        let all = self.engine.sessions().into_iter();
        all.map(|session| Session::new(session, Arc::clone(&self.engine))).collect()
    }

    /// Every VM that is served now, and each that comes from now on.
    fn arrivals(&self) -> Arrivals {
        Arrivals { arrivals: self.engine.arrivals(), engine: Arc::clone(&self.engine) }
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<StatsFields<'py>> {
        let totals = py.detach(|| self.engine.totals());
        stats::to_python(py, &totals)
    }

    /// What was wished for and could not be had: pairs of the wish and why.
    fn fallbacks(&self) -> Vec<(&'static str, String)> {
        self.engine.fallbacks().into_iter().map(|fallback| (fallback.wish, fallback.reason)).collect()
    }

    /// Whether what faults wait for is read by io_uring.
    fn reads_by_ring(&self) -> bool {
        self.engine.reads_by_ring()
    }

    /// How each worker waits now.
    fn workers(&self) -> Vec<&'static str> {
        self.engine.workers()
    }

    fn take_events<'py>(&self, py: Python<'py>, limit: usize) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.engine.events().take(limit).iter().map(|event| events::to_python(py, event)).collect()
    }

    /// How many events of each kind there have been, read or not.
    fn events_told(&self) -> BTreeMap<&'static str, u64> {
        self.engine.events().told()
    }

    fn event_descriptor(&self) -> RawFd {
        self.engine.descriptor().as_raw_fd()
    }

    fn drain(&self, py: Python<'_>) {
        py.detach(|| self.engine.drain());
    }

    fn close(&self, py: Python<'_>) -> Vec<String> {
        py.detach(|| self.engine.close())
    }
}

/// The VMs that began since this was asked for.
#[pyclass(frozen, module = "latepage._core")]
pub(crate) struct Arrivals {
    arrivals: Arc<Arrived>,
    engine: Arc<Engine>,
}

#[pymethods]
impl Arrivals {
    /// Those that were not taken yet, each once.
    fn take(&self) -> Vec<Session> {
        let all = self.arrivals.take().into_iter();
        all.map(|session| Session::new(session, Arc::clone(&self.engine))).collect()
    }
}
