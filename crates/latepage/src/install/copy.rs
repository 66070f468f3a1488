//! COPY and ZEROPAGE: for anonymous, private and hugetlb memory.

use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Install, Outcome, Stop};
use crate::memory::{Layout, PageSize};
use crate::sys::mapping::Window;
use crate::sys::uffd::{InstallMode, OwnersMemory, Userfaultfd};

/// As long as the longest page.
pub(crate) static ZEROS: [u8; 2 << 20] = [0; 2 << 20];

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
        let copied =
            Outcome::new(self.uffd.copy(place.hva, contents, InstallMode::empty()), place.page_size.bytes());
        absent(copied, place.page_size)
    }

    fn fill_window(&self, layout: &Layout, first: u32, contents: Window<'_>) -> Outcome {
        let place = layout.place(first);
        // The kernel copies a huge page in one step where it finds all of it mapped, and else begins anew, twelve times slower.
        let contents = if place.page_size == PageSize::Huge { contents.map_in() } else { contents };
        let copied = self.uffd.copy_window(place.hva, contents, InstallMode::empty());
        absent(Outcome::new(copied, place.page_size.bytes()), place.page_size)
    }

    fn fill_exposes(&self) -> bool {
        true
    }

    fn zero(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        let page_size = layout.place(pages.start).page_size;
        absent(self.zero_where_nothing_is(layout, pages), page_size)
    }

    /// A page that is not there though it was installed has been discarded without a word: private memory is zero then.
    ///
    /// A VMM may share memory of a file, be told of minor faults, and send us no file: a page that is in the file but not in
    /// the guest's page table is no zero page then, and only CONTINUE can bring it back.
    fn expose(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        let zeroed = self.zero_where_nothing_is(layout, pages.clone());
        if zeroed != (Outcome { pages: 0, stopped: Some(Stop::AlreadyThere) }) {
            return zeroed;
        }
        let place = layout.place(pages.start);
        match self.uffd.continue_(place.hva, place.page_size.bytes(), InstallMode::empty()).stopped {
            None => Outcome { pages: 1, stopped: None },
            Some(_) => zeroed,
        }
    }

    fn unprotect(&self, layout: &Layout, page: u32) -> Outcome {
        unprotect(&self.uffd, layout, page)
    }

    fn poison(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        poison(&self.uffd, layout, pages)
    }

    fn detach(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno> {
        detach(&self.uffd, layout, pages)
    }

    fn has_memory(&self) -> bool {
        self.uffd.has_memory()
    }

    fn is_changing(&self) -> bool {
        self.uffd.memory() == OwnersMemory::Changing
    }
}

impl CopyInstall {
    fn zero_where_nothing_is(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
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
}

/// What an outcome means for pages that are known to be absent.
///
/// Where no huge page can be had (an empty pool, a cgroup's limit), the kernel finds the page's empty slot in the page table and
/// says EEXIST (`hugetlb_mfill_atomic_pte`, seen on 6.18). Believed, it would have the waiter woken for ever, and the page,
/// taken for one that was there, come as zero when the pool has some again.
fn absent(outcome: Outcome, page_size: PageSize) -> Outcome {
    match outcome {
        Outcome { pages, stopped: Some(Stop::AlreadyThere) } if page_size == PageSize::Huge => {
            Outcome { pages, stopped: Some(Stop::NoMemory) }
        }
        outcome => outcome,
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

pub(super) fn detach(uffd: &Userfaultfd, layout: &Layout, pages: Range<u32>) -> Result<(), Errno> {
    layout
        .ranges(pages)
        .try_for_each(|(start, length)| uffd.unregister(start, length).map_err(|error| error.errno))
}
