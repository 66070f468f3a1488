//! A crowd's memory: shared, registered with a userfaultfd, and introduced to a pager.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use latepage::attachment::shards::{self, ShardError};
use latepage::attachment::{Backing, native};
use latepage::install::{InstallView, MinorInstall};
use latepage::memory::{Layout, PageSize, Region, Shards};
use latepage::sys::mapping::Mapping;
use latepage::sys::uffd::{Features, RegisterMode, Userfaultfd};
use latepage::sys::{fdpass, memfd};

use super::Crowd;
use crate::error::VmError;

pub(super) struct Memory {
    /// Before the userfaultfds: whose last reference lets nobody through while something is mapped.
    pub(super) view: Mapping,
    pub(super) file: OwnedFd,
    /// One for each shard.
    pub(super) uffds: Vec<Arc<Userfaultfd>>,
    pub(super) layout: Layout,
    pub(super) shards: Shards,
}

/// Memory of a file that nobody has touched, and where it lies.
pub(super) fn untouched(crowd: &Crowd) -> Result<(Mapping, OwnedFd, Layout), VmError> {
    let size = u64::from(crowd.pages) * 4096;
    let file = memfd::create("crowd", size).map_err(|errno| VmError::call("memfd_create", errno))?;
    let view = Mapping::shared(file.as_fd(), 0, size as usize)?;
    let region = Region { gpa: Some(0), hva: view.address(), size, offset: 0, page_size: PageSize::Small };
    let layout = Layout::new(vec![region]).map_err(|error| VmError::Config(error.to_string()))?;
    Ok((view, file, layout))
}

impl Memory {
    /// Absent memory of which each touch is a fault: at the userfaultfd, or with `Features::SIGBUS` a signal.
    pub(super) fn absent(crowd: &Crowd, features: Features) -> Result<Self, VmError> {
        let (view, file, layout) = untouched(crowd)?;
        let divided = Shards::equal(&layout, crowd.shards as usize).map_err(ShardError::from)?;
        let mode = RegisterMode::MISSING | RegisterMode::MINOR;
        let made = shards::create(&layout, &divided, features | Features::MINOR_SHMEM, mode)?;
        let uffds = made.into_iter().map(Arc::new).collect();
        Ok(Self { view, file, uffds, layout, shards: divided })
    }

    /// What exposes: there is one userfaultfd then.
    pub(super) fn install(&self) -> Result<MinorInstall, VmError> {
        Ok(MinorInstall::new(Arc::clone(&self.uffds[0]), InstallView::map(&self.file, &self.layout)?))
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
