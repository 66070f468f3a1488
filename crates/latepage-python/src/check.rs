//! What `latepage check` asks of the kernel and cannot ask from Python.
//!
//! Each answer is plain: None for "it works", an errno or words for why it does not.

use std::os::fd::{AsFd, RawFd};

use latepage::sys::mapping::Mapping;
use latepage::sys::probe;
use latepage::sys::uffd::{Features, InstallMode, RegisterMode, Userfaultfd};
use latepage::sys::{memfd, pidfd::PidFd};
use latepage_kvm::probe as kvm;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Gid, Uid};

const PAGE: usize = 4096;

/// Adds the functions to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(userfaultfd_ways, module)?)?;
    module.add_function(wrap_pyfunction!(userfaultfd_installs, module)?)?;
    module.add_function(wrap_pyfunction!(rights_of_user, module)?)?;
    module.add_function(wrap_pyfunction!(may_signal, module)?)?;
    module.add_function(wrap_pyfunction!(same_open_file, module)?)?;
    module.add_function(wrap_pyfunction!(io_uring, module)?)?;
    module.add_function(wrap_pyfunction!(kvm_trial, module)?)?;
    module.add_function(wrap_pyfunction!(guest_memfd, module)?)
}

type Tried = Option<i32>;

fn tried<T>(result: Result<T, Errno>) -> Tried {
    result.err().map(Errno::raw_os_error)
}

/// With its number, by which Python chooses the subclass.
fn os_error(errno: Errno) -> PyErr {
    let said = std::io::Error::from(errno).to_string();
    let words = said.split(" (os error").next().unwrap_or_default().to_owned();
    PyOSError::new_err((errno.raw_os_error(), words))
}

/// Whether this process may make a userfaultfd by the device, and by the system call.
#[pyfunction]
fn userfaultfd_ways() -> (Tried, Tried) {
    (tried(Userfaultfd::open_by_device()), tried(Userfaultfd::open_by_syscall()))
}

/// Whether a page can be installed by COPY, and by CONTINUE in shared memory; None as a whole where not even a userfaultfd for
/// user space alone may be made.
#[pyfunction]
fn userfaultfd_installs() -> Option<(Tried, Tried)> {
    let copies = || -> Result<(), Errno> {
        let memory = Mapping::anonymous(PAGE).map_err(|error| error.errno)?;
        let userfaultfd = some_userfaultfd(Features::empty())?;
        userfaultfd
            .register(memory.address(), PAGE as u64, RegisterMode::MISSING)
            .map_err(|error| error.errno)?;
        let installed = userfaultfd.copy(memory.address(), &[7; PAGE], InstallMode::empty());
        installed.stopped.map_or(Ok(()), Err)?;
        holds(&memory)
    };
    let continues = || -> Result<(), Errno> {
        let file = memfd::create("latepage-check", PAGE as u64)?;
        let guest = Mapping::shared(file.as_fd(), 0, PAGE).map_err(|error| error.errno)?;
        let install = Mapping::shared(file.as_fd(), 0, PAGE).map_err(|error| error.errno)?;
        let userfaultfd = some_userfaultfd(Features::MINOR_SHMEM)?;
        let modes = RegisterMode::MISSING | RegisterMode::MINOR;
        userfaultfd.register(guest.address(), PAGE as u64, modes).map_err(|error| error.errno)?;
        install.write(0, &[7; PAGE]);
        let installed = userfaultfd.continue_(guest.address(), PAGE as u64, InstallMode::empty());
        installed.stopped.map_or(Ok(()), Err)?;
        holds(&guest)
    };
    some_userfaultfd(Features::empty()).ok()?;
    Some((tried(copies()), tried(continues())))
}

fn some_userfaultfd(features: Features) -> Result<Userfaultfd, Errno> {
    Userfaultfd::create(features).or_else(|_| Userfaultfd::create_for_user_space(features))
}

fn holds(memory: &Mapping) -> Result<(), Errno> {
    if memory.load(0) == u64::from_ne_bytes([7; 8]) { Ok(()) } else { Err(Errno::IO) }
}

/// What a process with these ids could do: open a userfaultfd by the device, by the system call, and make a VM.
///
/// Tried on a thread that has become that user; it ends with the call. OSError where this process may not become them.
#[pyfunction]
fn rights_of_user(
    py: Python<'_>,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
) -> PyResult<(Tried, Tried, Option<String>)> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    let groups: Vec<Gid> = groups.into_iter().map(Gid::from_raw).collect();
    let answer = py.detach(|| {
        let became = rustix::process::dumpable_behavior();
        let answer = std::thread::scope(|scope| {
            let stranger = scope.spawn(|| {
                // Only this thread changes: the C library's calls of these names would change all of them.
                rustix::thread::set_thread_groups(&groups)?;
                rustix::thread::set_thread_res_gid(gid, gid, gid)?;
                rustix::thread::set_thread_res_uid(uid, uid, uid)?;
                let (device, syscall) = userfaultfd_ways();
                Ok((device, syscall, kvm::vm().err().map(|error| error.to_string())))
            });
            stranger.join().unwrap_or(Err(Errno::IO))
        });
        // A change of user makes the whole process one that nobody may look into.
        if let Ok(before @ DumpableBehavior::Dumpable) = became {
            let _ = rustix::process::set_dumpable_behavior(before);
        }
        answer
    });
    answer.map_err(os_error)
}

/// Whether this process may send signals to that one, through a pidfd. Sends nothing.
#[pyfunction]
fn may_signal(pid: u32) -> Tried {
    tried(PidFd::open(pid).and_then(|process| process.may_signal()))
}

/// Whether two descriptors, each as (pid, number), are one open file. OSError where that cannot be seen.
#[pyfunction]
fn same_open_file(one: (u32, RawFd), other: (u32, RawFd)) -> PyResult<bool> {
    probe::same_open_file(one, other).map_err(os_error)
}

/// Whether an io_uring can be made.
#[pyfunction]
fn io_uring() -> Tried {
    tried(probe::io_uring())
}

/// Tries on a VM of one page: `vm`, `userfaultfd`, `attributes` or `userfault`. None if it works, else why not.
#[pyfunction]
fn kvm_trial(py: Python<'_>, what: &str) -> PyResult<Option<String>> {
    let said = |result: Result<(), kvm::TrialError>| result.err().map(|error| error.to_string());
    py.detach(|| {
        Ok(match what {
            "vm" => said(kvm::vm().map_err(kvm::TrialError::from)),
            "userfaultfd" => said(kvm::fault_by_userfaultfd()),
            "attributes" => said(kvm::exit_by_attributes()),
            "userfault" => said(kvm::exit_by_userfault()),
            other => return Err(PyValueError::new_err(format!("no trial is called {other:?}"))),
        })
    })
}

/// What can be done with a guest_memfd: `made` (None or why not), `mapped` and `registered` (None or the errno; absent: not
/// tried), and the `modes` of a userfaultfd that it takes.
#[pyfunction]
fn guest_memfd(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let answer = PyDict::new(py);
    match py.detach(kvm::guest_memfd) {
        Err(error) => answer.set_item("made", error.to_string())?,
        Ok(tried) => {
            let made = tried.made.err().map(|error| error.to_string());
            let stopped = made.is_some();
            answer.set_item("made", made)?;
            if !stopped {
                answer.set_item("mapped", tried.unmappable.map(Errno::raw_os_error))?;
            }
            match tried.registered {
                None => {}
                Some(Err(errno)) => answer.set_item("registered", errno.raw_os_error())?,
                Some(Ok(modes)) => {
                    answer.set_item("registered", None::<i32>)?;
                    let names: Vec<_> =
                        modes.iter_names().map(|(name, _)| name.to_ascii_lowercase()).collect();
                    answer.set_item("modes", names)?;
                }
            }
        }
    }
    Ok(answer)
}
