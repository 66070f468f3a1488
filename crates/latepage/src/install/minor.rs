//! CONTINUE: for memory that is mapped twice, filled through the install view and exposed in the guest view.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::{Install, Outcome, Stop, copy};
use crate::memory::Layout;
use crate::sys::mapping::{MapError, Mapping, Window};
use crate::sys::uffd::{InstallMode, Installed, OwnersMemory, Userfaultfd};

/// Installs by writing through a second, never faulting view of the guest's memory file, and UFFDIO_CONTINUE.
///
/// For pages of 4 KiB: a store to a huge page that the pool does not have would be a SIGBUS, so huge pages are copied in.
pub struct MinorInstall {
    uffd: Arc<Userfaultfd>,
    view: InstallView,
}

/// The install view: guest memory's file, mapped a second time.
#[derive(Debug)]
pub struct InstallView {
    mapping: Mapping,
    /// The file once more, by an open of our own: the sender's could be set to append, which pwrite(2) obeys. `None` where
    /// there is no /proc to open it by.
    file: Option<OwnedFd>,
}

impl MinorInstall {
    /// Maps a second view of `memory`, which must be sealed against shrinking, as far as `layout` reaches.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map(memory: &OwnedFd, layout: &Layout) -> Result<InstallView, MapError> {
        let mapping = Mapping::shared(memory.as_fd(), 0, layout.end() as usize)?;
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok();
        Ok(InstallView { mapping, file })
    }

    /// Into the memory of the userfaultfd's creator, of which `view` is the install view.
    pub fn new(uffd: Arc<Userfaultfd>, view: InstallView) -> Self {
        Self { uffd, view }
    }
}

impl Install for MinorInstall {
    fn fill(&self, layout: &Layout, first: u32, contents: &[u8]) -> Outcome {
        let place = layout.place(first);
        self.view.mapping.write(place.offset as usize, contents);
        Outcome { pages: (contents.len() as u64 / place.page_size.bytes()) as u32, stopped: None }
    }

    /// By pwrite(2): one copy, and neither a fault on the install view nor a page that is zeroed first.
    fn fill_window(&self, layout: &Layout, first: u32, contents: Window<'_>) -> Outcome {
        let place = layout.place(first);
        let written = match &self.view.file {
            Some(file) => contents.write_to(file.as_fd(), place.offset),
            None => Err(Errno::FAULT),
        };
        let (bytes, stopped) = match written {
            Ok(bytes) => (bytes as u64, (bytes < contents.len()).then_some(Errno::FAULT)),
            Err(errno) => (0, Some(errno)),
        };
        Outcome::new(Installed { bytes, stopped }, place.page_size.bytes())
    }

    fn fill_exposes(&self) -> bool {
        false
    }

    /// The kernel adds a zero page to the file and maps it, or says that the file has a page already.
    fn zero(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        let place = layout.place(pages.start);
        let bytes = place.page_size.bytes();
        let length = u64::from(pages.end - pages.start) * bytes;
        Outcome::new(self.uffd.zeropage(place.hva, length, InstallMode::empty()), bytes)
    }

    fn expose(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        let place = layout.place(pages.start);
        let bytes = place.page_size.bytes();
        let length = u64::from(pages.end - pages.start) * bytes;
        let exposed = Outcome::new(self.uffd.continue_(place.hva, length, InstallMode::empty()), bytes);
        match exposed {
            // The file has a hole where we had filled it: punched since, so it reads as zero.
            Outcome { pages: 0, stopped: Some(Stop::Hole) } => {
                self.zero(layout, pages.start..pages.start + 1)
            }
            outcome => outcome,
        }
    }

    fn unprotect(&self, layout: &Layout, page: u32) -> Outcome {
        copy::unprotect(&self.uffd, layout, page)
    }

    fn poison(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        copy::poison(&self.uffd, layout, pages)
    }

    fn detach(&self, layout: &Layout) -> Result<(), Errno> {
        copy::detach(&self.uffd, layout)
    }

    fn has_memory(&self) -> bool {
        self.uffd.has_memory()
    }

    fn is_changing(&self) -> bool {
        self.uffd.memory() == OwnersMemory::Changing
    }
}
