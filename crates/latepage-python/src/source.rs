//! Sources, as Python holds them.

use std::path::PathBuf;
use std::sync::Arc;

use latepage::source::{FileSource as MemoryFile, Source};
use pyo3::prelude::*;

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

/// Opens a memory file.
#[pyfunction]
pub(crate) fn open_file(py: Python<'_>, path: PathBuf) -> PyResult<FileSource> {
    let source = py.detach(|| MemoryFile::open(&path)).map_err(|error| source_error(py, &error))?;
    Ok(FileSource { source: Arc::new(source) })
}
