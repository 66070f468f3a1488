//! The reference VMM, as Python holds it: a VM, asked by JSON as over its API socket. `latepage.kvm` gives it its types.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use latepage_kvm::{ApiServer, RestoreConfig, Vm as Machine, VmConfig, VmError, api};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::{Place, raise};

/// Adds the class `Vm` to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Vm>()
}

/// A VM of the reference VMM, in this process.
#[pyclass(frozen, module = "latepage._core")]
struct Vm {
    held: Mutex<Option<Held>>,
}

struct Held {
    /// Before the VM: it answers from it.
    server: Option<ApiServer>,
    vm: Arc<Machine>,
}

#[pymethods]
impl Vm {
    /// Creates a VM, as the JSON of a `VmConfig` says.
    #[staticmethod]
    fn create(py: Python<'_>, config: &str) -> PyResult<Self> {
        let config: VmConfig = serde_json::from_str(config).map_err(not_understood)?;
        Self::made(py, || Machine::create(&config), &config.name)
    }

    /// Restores a VM, as the JSON of a `RestoreConfig` says.
    #[staticmethod]
    fn restore(py: Python<'_>, config: &str) -> PyResult<Self> {
        let config: RestoreConfig = serde_json::from_str(config).map_err(not_understood)?;
        Self::made(py, || Machine::restore(&config), config.name.as_deref().unwrap_or_default())
    }

    /// Does what a line of JSON asks, and returns the line that answers it.
    fn request(&self, py: Python<'_>, line: &str) -> PyResult<String> {
        let vm = self.vm(py)?;
        Ok(py.detach(|| {
            let answer = api::answer(&vm, line);
            if answer.quits {
                vm.ask_to_quit();
            }
            answer.line
        }))
    }

    /// The next event as JSON, if one is there or comes within `timeout` seconds (for ever if None).
    fn next_event(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<String>> {
        let vm = self.vm(py)?;
        let timeout = timeout.map(Duration::try_from_secs_f64).transpose();
        let timeout = timeout.map_err(|error| PyValueError::new_err(error.to_string()))?;
        let event = py.detach(|| vm.next_event(timeout));
        let text = event.map(|event| serde_json::to_string(&event)).transpose();
        text.map_err(not_understood)
    }

    /// A descriptor that is readable while events wait. It is the VM's: not to be closed.
    fn event_descriptor(&self, py: Python<'_>) -> PyResult<i32> {
        use std::os::fd::AsRawFd;
        Ok(self.vm(py)?.events().as_raw_fd())
    }

    /// Answers requests at a Unix socket until the VM is closed.
    fn listen(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        let vm = self.vm(py)?;
        let server =
            py.detach(|| ApiServer::start(&vm, &path)).map_err(|error| guest_error(py, &error, vm.name()))?;
        if let Some(held) = &mut *self.lock() {
            held.server = Some(server);
        }
        Ok(())
    }

    /// Ends the VM. What waits for it elsewhere is told so.
    fn close(&self, py: Python<'_>) {
        let held = self.lock().take();
        py.detach(|| {
            if let Some(Held { server, vm }) = held {
                vm.end();
                drop(server);
                drop(vm);
            }
        });
    }
}

impl Vm {
    fn made(
        py: Python<'_>,
        make: impl FnOnce() -> Result<Machine, VmError> + Send,
        name: &str,
    ) -> PyResult<Self> {
        let vm = py.detach(make).map_err(|error| guest_error(py, &error, name))?;
        Ok(Self { held: Mutex::new(Some(Held { server: None, vm: Arc::new(vm) })) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vm(&self, py: Python<'_>) -> PyResult<Arc<Machine>> {
        let held = self.lock();
        let vm = held.as_ref().map(|held| Arc::clone(&held.vm));
        vm.ok_or_else(|| raise(py, "GuestError", "the VM was closed", &Place::default()))
    }
}

/// `ValueError` for what cannot be asked for, `latepage.GuestError` for what went wrong.
fn guest_error(py: Python<'_>, error: &VmError, vm: &str) -> PyErr {
    if error.kind() == "usage" {
        return PyValueError::new_err(error.to_string());
    }
    let vm = Some(vm).filter(|vm| !vm.is_empty());
    let (call, errno) = error.call_and_errno();
    raise(py, "GuestError", &error.to_string(), &Place { vm, call, errno, ..Place::default() })
}

fn not_understood(error: serde_json::Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}
