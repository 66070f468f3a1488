//! Sources, as Python holds them.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use latepage::source::queue::RequestQueue;
use latepage::source::{FileSource as MemoryFile, Source};
use pyo3::prelude::*;

use crate::callback::CallbackSource;
use crate::errors::source_error;

/// A memory file that is open for serving.
#[pyclass(frozen, module = "latepage._core")]
pub(crate) struct FileSource {
    pub(crate) source: Arc<dyn Source>,
}

#[pymethods]
impl FileSource {
    /// Bytes of guest memory that it holds.
    #[getter]
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn describe(&self) -> String {
        self.source.describe()
    }
}

/// Whatever a pager can listen with.
#[derive(FromPyObject)]
pub(crate) enum AnySource<'py> {
    File(PyRef<'py, FileSource>),
    Callback(PyRef<'py, CallbackSource>),
}

/// A queue, and the source of it that a pager listens with.
pub(crate) type Queued = (Arc<RequestQueue>, Arc<dyn Source>);

impl AnySource<'_> {
    /// The engine's source for a pager that has these already, and what it has not had yet. A queue has one source for each
    /// pager, so that the end of a pager ends what it waits for, and nothing else.
    pub(crate) fn for_pager(&self, known: &Mutex<Vec<Queued>>) -> (Arc<dyn Source>, Option<Queued>) {
        let queue = match self {
            Self::File(file) => return (Arc::clone(&file.source), None),
            Self::Callback(callback) => &callback.queue,
        };
        let known = known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, source)) = known.iter().find(|(same, _)| Arc::ptr_eq(same, queue)) {
            return (Arc::clone(source), None);
        }
        let source: Arc<dyn Source> = Arc::new(queue.source());
        (Arc::clone(&source), Some((Arc::clone(queue), source)))
    }
}

/// Opens a memory file, with zero maps in that folder.
#[pyfunction]
#[pyo3(signature = (path, zero_maps=None))]
pub(crate) fn open_file(py: Python<'_>, path: PathBuf, zero_maps: Option<PathBuf>) -> PyResult<FileSource> {
    let open = || match &zero_maps {
        Some(folder) => MemoryFile::open_keeping(&path, folder),
        None => MemoryFile::open(&path),
    };
    let source = py.detach(open).map_err(|error| source_error(py, &error))?;
    Ok(FileSource { source: Arc::new(source) })
}

/// Pages, those in holes, those that are zero; the zero map's path, and why there is none; what else there is to say.
type Scanned = (u64, u64, u64, Option<PathBuf>, Option<String>, Vec<String>);

/// Looks at every page of a memory file, and keeps a zero map of it in that folder.
#[pyfunction]
pub(crate) fn scan_file(py: Python<'_>, path: PathBuf, zero_maps: Option<PathBuf>) -> PyResult<Scanned> {
    let mut interrupted = None;
    let scanned = py.detach(|| {
        let source = match &zero_maps {
            Some(folder) => MemoryFile::open_keeping(&path, folder)?,
            None => MemoryFile::open(&path)?,
        };
        let go_on = |_| {
            interrupted = Python::attach(|py| py.check_signals().err());
            interrupted.is_none()
        };
        let scan = source.scan(go_on)?;
        Ok((scan, source.check().iter().map(ToString::to_string).collect()))
    });
    if let Some(error) = interrupted {
        return Err(error);
    }
    let (scan, told) = scanned.map_err(|error| source_error(py, &error))?;
    let (map, why) = scan.map.map_or_else(|why| (None, Some(why)), |map| (Some(map), None));
    Ok((scan.pages, scan.holes, scan.zeros, map, why, told))
}
