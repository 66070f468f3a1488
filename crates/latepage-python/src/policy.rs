//! Policies: from the fields of `latepage.Policy`, which has checked them, to the engine's.

use std::time::Duration;

use latepage::session::{FaultAround, OnMissing, Placement, Policy, Population};
use pyo3::conversion::FromPyObjectOwned;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The engine's policy with these fields.
pub(crate) fn from_python(fields: &Bound<'_, PyDict>) -> PyResult<Policy> {
    let allow_uids: Vec<u32> = field(fields, "allow_uids")?;
    Ok(Policy {
        population: match field::<String>(fields, "populate")?.as_str() {
            "none" => Population::None,
            "background" => Population::Background,
            other => return Err(PyValueError::new_err(format!("populate: {other}"))),
        },
        fault_around: field::<Option<u64>>(fields, "fault_around")?
            .map_or(FaultAround::Auto, FaultAround::Window),
        placement: placement(&field::<String>(fields, "placement")?)?,
        on_missing: match field::<String>(fields, "on_missing")?.as_str() {
            "kill" => OnMissing::Kill,
            "poison" => OnMissing::Poison,
            other => return Err(PyValueError::new_err(format!("on_missing: {other}"))),
        },
        stall_warning: seconds(fields, "stall_warning")?,
        handshake_timeout: seconds(fields, "handshake_timeout")?,
        allow_uids: (!allow_uids.is_empty()).then_some(allow_uids),
        mode: field(fields, "mode")?,
        owner: field(fields, "owner")?,
        detach_when_full: field(fields, "detach_when_full")?,
        trace: field(fields, "trace")?,
    })
}

fn placement(name: &str) -> PyResult<Placement> {
    Ok(match name {
        "auto" => Placement::Auto,
        "block" => Placement::Block,
        "spin" => Placement::Spin,
        "same-core" => Placement::SameCore,
        other => match other.strip_prefix("core:").map(str::parse) {
            Some(Ok(core)) => Placement::Core(core),
            _ => return Err(PyValueError::new_err(format!("placement: {other}"))),
        },
    })
}

fn field<'py, T: FromPyObjectOwned<'py>>(fields: &Bound<'py, PyDict>, name: &str) -> PyResult<T> {
    let value = fields.get_item(name)?.ok_or_else(|| PyValueError::new_err(format!("{name} is missing")))?;
    value.extract().map_err(Into::into)
}

fn seconds(fields: &Bound<'_, PyDict>, name: &str) -> PyResult<Duration> {
    let value = field::<f64>(fields, name)?;
    Duration::try_from_secs_f64(value).map_err(|error| PyValueError::new_err(format!("{name}: {error}")))
}
