//! The native module `latepage._core`: conversions and errors only.
//!
//! Engine threads never call Python, and every call from Python that may wait lets go of the GIL first. The types that users
//! see are Python's (`latepage.pager`, `.session`, `.events`); what is handed out here is plain.

mod callback;
mod check;
mod crowd;
mod errors;
mod events;
mod pager;
mod policy;
mod session;
mod source;
mod stats;
mod sys;
mod trace;
mod vm;

use latepage::sys::uffd::Userfaultfd;
use pyo3::prelude::*;

/// The names of the userfaultfd features that this kernel offers; none where not even one for user space alone may be made.
#[pyfunction]
fn userfaultfd_features() -> Option<Vec<String>> {
    let offered = Userfaultfd::offered().ok().or_else(|| Userfaultfd::offered_to_user_space().ok())?;
    Some(offered.iter_names().map(|(name, _)| name.to_ascii_lowercase()).collect())
}

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::callback::{CallbackSource, Follower};
    #[pymodule_export]
    use super::pager::{Arrivals, Pager};
    #[pymodule_export]
    use super::session::Session;
    #[pymodule_export]
    use super::source::{FileSource, open_file, scan_file};
    #[pymodule_export]
    use super::userfaultfd_features;

    use super::session::PAGE_STATES;
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::vm::register(module)?;
        super::check::register(module)?;
        super::crowd::register(module)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("LATENCY_BOUNDS", super::stats::bounds())?;
        module.add("PAGE_STATES", PAGE_STATES.to_vec())
    }
}
