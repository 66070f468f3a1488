//! A crowd's memory: shared, registered with a userfaultfd, and introduced to a pager.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use latepage::attachment::{Backing, native};
use latepage::install::{InstallView, MinorInstall};
use latepage::memory::{Layout, PageSize, Region};
use latepage::sys::mapping::Mapping;
use latepage::sys::uffd::{Features, RegisterMode, Userfaultfd};
use latepage::sys::{fdpass, memfd};

use super::Crowd;
use crate::error::VmError;

pub(super) struct Memory {
    /// Before the userfaultfd: whose last reference lets nobody through while something is mapped.
    pub(super) view: Mapping,
    pub(super) file: OwnedFd,
    pub(super) uffd: Arc<Userfaultfd>,
    pub(super) layout: Layout,
}

impl Memory {
    /// Absent memory of which each touch is a fault: at the userfaultfd, or with `Features::SIGBUS` a signal.
    pub(super) fn absent(crowd: &Crowd, features: Features) -> Result<Self, VmError> {
        let size = u64::from(crowd.pages) * 4096;
        let file = memfd::create("crowd", size).map_err(|errno| VmError::call("memfd_create", errno))?;
        let view = Mapping::shared(file.as_fd(), 0, size as usize)?;
        let uffd = Arc::new(Userfaultfd::create(features | Features::MINOR_SHMEM)?);
        uffd.register(view.address(), size, RegisterMode::MISSING | RegisterMode::MINOR)?;
        let region =
            Region { gpa: Some(0), hva: view.address(), size, offset: 0, page_size: PageSize::Small };
        let layout = Layout::new(vec![region]).map_err(|error| VmError::Config(error.to_string()))?;
        Ok(Self { view, file, uffd, layout })
    }

    /// What exposes, and fills where the thread itself brings pages.
    pub(super) fn install(&self) -> Result<MinorInstall, VmError> {
        Ok(MinorInstall::new(Arc::clone(&self.uffd), InstallView::map(&self.file, &self.layout)?))
    }

    /// What a pager is told.
    pub(super) fn introduction<'a>(&'a self, crowd: &Crowd) -> native::Introduction<'a> {
        native::Introduction {
            name: None,
            vcpus: crowd.threads,
            backing: Backing::Shared,
            memory: true,
            layout: &self.layout,
        }
    }
}

/// Tells a pager of this memory; it serves for as long as the socket is open.
pub(super) fn connect(
    path: &Path,
    message: &str,
    descriptors: &[BorrowedFd<'_>],
) -> Result<UnixStream, VmError> {
    let failed = |source| VmError::Pager { path: path.to_path_buf(), source };
    let socket = UnixStream::connect(path).map_err(failed)?;
    match fdpass::send(&socket, message.as_bytes(), descriptors) {
        Ok(sent) if sent == message.len() => Ok(socket),
        Ok(_) => Err(failed(io::Error::new(io::ErrorKind::WriteZero, "the handshake did not fit"))),
        Err(errno) => Err(failed(errno.into())),
    }
}
