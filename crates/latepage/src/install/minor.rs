//! CONTINUE: for memory that is mapped twice, filled through the install view and exposed in the guest view.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Install, InstallView, Outcome, Stop, copy};
use crate::memory::Layout;
use crate::sys::mapping::{MapError, Window};
use crate::sys::uffd::{InstallMode, OwnersMemory, Userfaultfd};

/// Installs by writing through a second, never faulting view of the guest's memory file, and UFFDIO_CONTINUE.
///
/// For pages of 4 KiB: a store to a huge page that the pool does not have would be a SIGBUS, so huge pages are copied in.
pub struct MinorInstall {
    uffd: Arc<Userfaultfd>,
    view: Arc<InstallView>,
}

impl MinorInstall {
    /// Maps a second view of `memory`, which must be sealed against shrinking, as far as `layout` reaches.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map(memory: &OwnedFd, layout: &Layout) -> Result<InstallView, MapError> {
        InstallView::map(memory, layout)
    }

    /// Into the memory of the userfaultfd's creator, of which `view` is the install view. Several may share one.
    pub fn new(uffd: Arc<Userfaultfd>, view: impl Into<Arc<InstallView>>) -> Self {
        Self { uffd, view: view.into() }
    }
}

impl Install for MinorInstall {
    fn fill(&self, layout: &Layout, first: u32, contents: &[u8]) -> Outcome {
        self.view.fill(layout, first, contents)
    }

    fn fill_window(&self, layout: &Layout, first: u32, contents: Window<'_>) -> Outcome {
        self.view.fill_window(layout, first, contents)
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

    fn blank(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.view.holes(layout, pages)
    }

    fn expose(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        let place = layout.place(pages.start);
        let bytes = place.page_size.bytes();
        let length = u64::from(pages.end - pages.start) * bytes;
        let exposed = Outcome::new(self.uffd.continue_(place.hva, length, InstallMode::empty()), bytes);
        match exposed {
            // The file has a hole there: it was zero, or was punched since. So it reads as zero, and so do the holes behind it.
            Outcome { pages: 0, stopped: Some(Stop::Hole) } => match self.zero(layout, pages) {
                // What the file has something of is not exposed yet: that is another call.
                Outcome { pages, stopped: Some(Stop::AlreadyThere) } if pages > 0 => {
                    Outcome { pages, stopped: None }
                }
                outcome => outcome,
            },
            outcome => outcome,
        }
    }

    fn unprotect(&self, layout: &Layout, page: u32) -> Outcome {
        copy::unprotect(&self.uffd, layout, page)
    }

    fn poison(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        copy::poison(&self.uffd, layout, pages)
    }

    fn detach(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno> {
        copy::detach(&self.uffd, layout, pages)
    }

    fn has_memory(&self) -> bool {
        self.uffd.has_memory()
    }

    fn is_changing(&self) -> bool {
        self.uffd.memory() == OwnersMemory::Changing
    }
}
