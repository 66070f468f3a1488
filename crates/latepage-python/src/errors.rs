//! What goes wrong in the engine, as the classes of `latepage.errors`.

use latepage::pager::ListenError;
use latepage::source::SourceError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rustix::io::Errno;

/// Where something went wrong, as far as it is known.
#[derive(Debug, Default)]
pub(crate) struct Place<'a> {
    pub(crate) vm: Option<&'a str>,
    pub(crate) address: Option<u64>,
    pub(crate) call: Option<&'a str>,
    pub(crate) errno: Option<i32>,
}

/// The exception of `latepage.errors` with that name. Python's own error where even that cannot be made.
pub(crate) fn raise(py: Python<'_>, class: &str, message: &str, place: &Place<'_>) -> PyErr {
    let make = || {
        let fields = PyDict::new(py);
        fields.set_item("vm", place.vm)?;
        fields.set_item("address", place.address)?;
        fields.set_item("call", place.call)?;
        fields.set_item("errno", place.errno)?;
        py.import("latepage.errors")?.getattr(class)?.call((message,), Some(&fields))
    };
    match make() {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}

/// `latepage.SourceError`.
pub(crate) fn source_error(py: Python<'_>, error: &SourceError) -> PyErr {
    let place = match error {
        SourceError::Missing { .. } => {
            Place { call: Some("open"), errno: Some(Errno::NOENT.raw_os_error()), ..Place::default() }
        }
        SourceError::Unreadable { errno, .. } => {
            Place { call: Some("open"), errno: Some(errno.raw_os_error()), ..Place::default() }
        }
        SourceError::Read { errno, offset, .. } => Place {
            call: Some("preadv2"),
            errno: Some(errno.raw_os_error()),
            address: Some(*offset),
            ..Place::default()
        },
        SourceError::Truncated { offset, .. } | SourceError::Beyond { offset, .. } => {
            Place { address: Some(*offset), ..Place::default() }
        }
        _ => Place::default(),
    };
    raise(py, "SourceError", &error.to_string(), &place)
}

/// `latepage.ListenError`.
pub(crate) fn listen_error(py: Python<'_>, error: &ListenError) -> PyErr {
    let place = match error {
        ListenError::Call { call, errno, .. } => {
            Place { call: Some(call), errno: Some(errno.raw_os_error()), ..Place::default() }
        }
        _ => Place::default(),
    };
    raise(py, "ListenError", &error.to_string(), &place)
}
