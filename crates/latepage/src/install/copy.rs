//! COPY and ZEROPAGE: for anonymous, private and hugetlb memory.

use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Install, Outcome};
use crate::memory::{Layout, PageSize};
use crate::sys::uffd::{InstallMode, Userfaultfd};

static ZEROS: [u8; 2 << 20] = [0; 2 << 20];

/// Installs by UFFDIO_COPY and UFFDIO_ZEROPAGE, which fill and expose in one step.
pub struct CopyInstall {
    uffd: Arc<Userfaultfd>,
}

impl CopyInstall {
    /// Into the memory of the userfaultfd's creator.
    pub fn new(uffd: Arc<Userfaultfd>) -> Self {
        Self { uffd }
    }
}

impl Install for CopyInstall {
    fn fill(&self, layout: &Layout, first: u32, contents: &[u8]) -> Outcome {
        let place = layout.place(first);
        Outcome::new(self.uffd.copy(place.hva, contents, InstallMode::empty()), place.page_size.bytes())
    }

    fn fill_exposes(&self) -> bool {
        true
    }

    fn zero(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        let place = layout.place(pages.start);
        let bytes = place.page_size.bytes();
        let installed = match place.page_size {
            PageSize::Small => self.uffd.zeropage(
                place.hva,
                u64::from(pages.end - pages.start) * bytes,
                InstallMode::empty(),
            ),
            // There is no shared zero page of 2 MiB: one is copied at a time.
            PageSize::Huge => self.uffd.copy(place.hva, &ZEROS, InstallMode::empty()),
        };
        Outcome::new(installed, bytes)
    }

    /// A page that is not there though it was installed has been discarded without a word: private memory is zero then.
    fn expose(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.zero(layout, pages)
    }

    fn unprotect(&self, layout: &Layout, page: u32) -> Outcome {
        unprotect(&self.uffd, layout, page)
    }

    fn poison(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        poison(&self.uffd, layout, pages)
    }

    fn detach(&self, layout: &Layout) -> Result<(), Errno> {
        detach(&self.uffd, layout)
    }

    fn has_memory(&self) -> bool {
        self.uffd.has_memory()
    }
}

pub(super) fn unprotect(uffd: &Userfaultfd, layout: &Layout, page: u32) -> Outcome {
    let place = layout.place(page);
    match uffd.write_protect(place.hva, place.page_size.bytes(), false) {
        Ok(()) => Outcome { pages: 1, stopped: None },
        Err(error) => Outcome::new(
            crate::sys::uffd::Installed { bytes: 0, stopped: Some(error.errno) },
            place.page_size.bytes(),
        ),
    }
}

pub(super) fn poison(uffd: &Userfaultfd, layout: &Layout, pages: Range<u32>) -> Outcome {
    let place = layout.place(pages.start);
    let bytes = place.page_size.bytes();
    Outcome::new(
        uffd.poison(place.hva, u64::from(pages.end - pages.start) * bytes, InstallMode::empty()),
        bytes,
    )
}

pub(super) fn detach(uffd: &Userfaultfd, layout: &Layout) -> Result<(), Errno> {
    layout
        .regions()
        .iter()
        .try_for_each(|region| uffd.unregister(region.hva, region.size).map_err(|error| error.errno))
}
