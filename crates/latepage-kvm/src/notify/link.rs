//! The connection to the pager: open for as long as the VM lives.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::control::Control;
use crate::error::VmError;
use crate::event::Event;

use super::handover::Handover;

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    socket: UnixStream,
    path: PathBuf,
    leaving: Arc<AtomicBool>,
    watcher: Mutex<Option<JoinHandle<()>>>,
}

impl Link {
    /// Connects to the pager, and hands it the VM.
    pub(super) fn connect(path: &Path, handover: &Handover) -> Result<Self, VmError> {
        let failed = |source| VmError::Pager { path: path.to_path_buf(), source };
        let socket = UnixStream::connect(path).map_err(failed)?;
        handover.send(&socket).map_err(failed)?;
        Ok(Self { socket, path: path.to_path_buf(), leaving: Arc::default(), watcher: Mutex::default() })
    }

    /// Tells `control` when the pager goes away. Whoever waits goes on waiting.
    pub(super) fn watch(&self, control: &Arc<Control>) -> Result<(), VmError> {
        let failed = |source| VmError::Pager { path: self.path.clone(), source };
        let mut socket = self.socket.try_clone().map_err(failed)?;
        let (control, leaving) = (Arc::clone(control), Arc::clone(&self.leaving));
        let watcher = thread::Builder::new().name("pager-watch".into()).spawn(move || {
            let mut said = Vec::new();
            let _ = Read::by_ref(&mut socket).take(4096).read_to_end(&mut said);
            if !leaving.load(Ordering::Acquire) {
                let said = String::from_utf8_lossy(&said).trim().to_owned();
                control.events.push(Event::PagerGone { said, ns: control.now() });
            }
        });
        *self.watcher.lock().unwrap_or_else(PoisonError::into_inner) = Some(watcher.map_err(failed)?);
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.leaving.store(true, Ordering::Release);
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(watcher) = self.watcher.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = watcher.join();
        }
    }
}
