//! COPY into shared memory whose file came along: one call fills a page and exposes it.

use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Install, InstallView, MinorInstall, Outcome, Stop};
use crate::memory::Layout;
use crate::sys::mapping::Window;
use crate::sys::uffd::{InstallMode, Userfaultfd};

/// Installs by UFFDIO_COPY. What the file has already at an absent page may be anything (a file that served another VM before), so
/// there contents are written through the install view and exposed by CONTINUE, as [`MinorInstall`] does everywhere.
///
/// Whether the guest sees such a page already only CONTINUE tells, and by then it has been written over: nobody but this may put pages
/// into the regions, which is what the handshake asks of a VMM that sends its memory. The outcome is [`Stop::AlreadyThere`] then.
///
/// The file gets a page and the guest sees it in one call of a third less time than pwrite(2) and UFFDIO_CONTINUE take. For VMs
/// whose table of pages ends with their session: nothing is noted between filling and exposing.
pub struct SharedInstall {
    uffd: Arc<Userfaultfd>,
    second: MinorInstall,
}

impl SharedInstall {
    /// Into the memory of the userfaultfd's creator, of which `view` is the install view. Several may share one.
    pub fn new(uffd: Arc<Userfaultfd>, view: impl Into<Arc<InstallView>>) -> Self {
        let second = MinorInstall::new(Arc::clone(&uffd), view);
        Self { uffd, second }
    }

    /// What COPY did, or at a page that the file has, what the second way does.
    fn or_over(
        &self,
        layout: &Layout,
        first: u32,
        copied: Outcome,
        fill: impl FnOnce() -> Outcome,
    ) -> Outcome {
        match copied {
            // Asked again from there on, it is the first.
            Outcome { pages, stopped: Some(Stop::AlreadyThere) } if pages > 0 => {
                Outcome { pages, stopped: None }
            }
            Outcome { stopped: Some(Stop::AlreadyThere), .. } => match fill() {
                Outcome { pages: 0, stopped } => Outcome { pages: 0, stopped },
                filled => self.second.expose(layout, first..first + filled.pages),
            },
            copied => copied,
        }
    }
}

impl Install for SharedInstall {
    fn fill(&self, layout: &Layout, first: u32, contents: &[u8]) -> Outcome {
        let place = layout.place(first);
        let bytes = place.page_size.bytes();
        let copied = Outcome::new(self.uffd.copy(place.hva, contents, InstallMode::empty()), bytes);
        let one = &contents[..bytes as usize];
        self.or_over(layout, first, copied, || self.second.fill(layout, first, one))
    }

    fn fill_window(&self, layout: &Layout, first: u32, contents: Window<'_>) -> Outcome {
        let place = layout.place(first);
        let bytes = place.page_size.bytes();
        let copied = Outcome::new(self.uffd.copy_window(place.hva, contents, InstallMode::empty()), bytes);
        let one = contents.part(0..bytes as usize);
        self.or_over(layout, first, copied, || self.second.fill_window(layout, first, one))
    }

    fn fill_exposes(&self) -> bool {
        true
    }

    fn may_hold_anything(&self) -> bool {
        true
    }

    fn zero(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.second.zero(layout, pages)
    }

    fn blank(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.second.blank(layout, pages)
    }

    fn expose(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.second.expose(layout, pages)
    }

    fn unprotect(&self, layout: &Layout, page: u32) -> Outcome {
        self.second.unprotect(layout, page)
    }

    fn poison(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.second.poison(layout, pages)
    }

    fn detach(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno> {
        self.second.detach(layout, pages)
    }

    fn has_memory(&self) -> bool {
        self.second.has_memory()
    }

    fn is_changing(&self) -> bool {
        self.second.is_changing()
    }
}
