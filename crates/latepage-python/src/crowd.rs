//! The crowd of threads that `latepage bench scale` measures; asked, and answered, in JSON.

use latepage_kvm::VmError;
use latepage_kvm::crowd::Crowd;
use latepage_kvm::crowd::channel::ChannelSteps;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use serde::Serialize;

use crate::errors::{Place, raise};

/// Adds the functions to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(crowd, module)?)?;
    module.add_function(wrap_pyfunction!(channel_steps, module)?)
}

/// Has a crowd touch memory, as the JSON of a `Crowd` says; its `CrowdReport`.
#[pyfunction]
fn crowd(py: Python<'_>, asked: &str) -> PyResult<String> {
    let asked: Crowd =
        serde_json::from_str(asked).map_err(|error| PyValueError::new_err(error.to_string()))?;
    said(py, py.detach(|| asked.run()))
}

/// Times the steps of the channel, as the JSON of a `ChannelSteps` says; its `StepTimes`.
#[pyfunction]
fn channel_steps(py: Python<'_>, asked: &str) -> PyResult<String> {
    let asked: ChannelSteps =
        serde_json::from_str(asked).map_err(|error| PyValueError::new_err(error.to_string()))?;
    said(py, py.detach(|| asked.run()))
}

fn said(py: Python<'_>, result: Result<impl Serialize, VmError>) -> PyResult<String> {
    let report = result.map_err(|error| {
        let (call, errno) = error.call_and_errno();
        raise(py, "GuestError", &error.to_string(), &Place { call, errno, ..Place::default() })
    })?;
    serde_json::to_string(&report).map_err(|error| PyValueError::new_err(error.to_string()))
}
