//! Install: how contents get into the guest, in two steps.
//!
//! *Fill* puts the contents where they belong; *expose* lets the guest see them. COPY and ZEROPAGE do both at once; CONTINUE
//! only exposes what was filled through a second view of the same memory. Where a bit for each page makes accesses trap, to clear it
//! exposes; where only the VMM's own process can expose, it is left to that.

mod bitmap;
mod copy;
mod fill;
mod minor;
mod shared;
#[cfg(test)]
mod tests;
mod trap;
mod view;

use std::ops::Range;

use rustix::io::Errno;

use crate::memory::Layout;
use crate::sys::mapping::Window;
use crate::sys::uffd::Installed;

pub use bitmap::{BitmapError, BitmapInstall, PageBitmap};
pub use copy::CopyInstall;
pub(crate) use copy::ZEROS;
pub use fill::FillInstall;
pub use minor::MinorInstall;
pub use shared::SharedInstall;
pub use trap::Trap;
pub use view::InstallView;

/// Why an install went no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// EEXIST: the next page is there already. Who waits for it must still be released.
    AlreadyThere,
    /// EAGAIN: an event (a removal, say) is unread, or its thread has not run since. Take events, then try again.
    Busy,
    /// ENOMEM, or EEXIST for a huge page that is not there: the kernel, or the pool of huge pages, has none left. Try again later.
    NoMemory,
    /// ENOENT: no such registered range any more: the layout changed under us.
    Unmapped,
    /// ESRCH: the process is gone.
    Gone,
    /// EFAULT. Of CONTINUE: the page is not in the file, so there is nothing to expose. Of a fill from a window: it shows nothing
    /// there (any more).
    Hole,
    /// Anything else.
    Failed(Errno),
}

/// How far an install came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Whole pages done, from the first. Who waited for them has been released.
    pub pages: u32,
    /// What it met at the next page, if it did not reach the end.
    pub stopped: Option<Stop>,
}

impl Outcome {
    fn new(installed: Installed, page_bytes: u64) -> Self {
        let pages = (installed.bytes / page_bytes) as u32;
        let stopped = installed.stopped.and_then(|errno| match errno {
            // A partial install says EAGAIN too. Only asking again at the page where it stopped tells why.
            Errno::AGAIN if pages > 0 => None,
            Errno::AGAIN => Some(Stop::Busy),
            Errno::EXIST => Some(Stop::AlreadyThere),
            Errno::NOMEM => Some(Stop::NoMemory),
            Errno::NOENT => Some(Stop::Unmapped),
            Errno::SRCH => Some(Stop::Gone),
            Errno::FAULT => Some(Stop::Hole),
            errno => Some(Stop::Failed(errno)),
        });
        Self { pages, stopped }
    }
}

/// How contents get into a guest. A run of pages never crosses a region.
///
/// Every call may stop early without a reason ([`Outcome::stopped`] is `None` and pages are left): the caller goes on from there.
pub trait Install: Send + Sync {
    /// Puts `contents`, whole pages from page `first` on, where they belong.
    fn fill(&self, layout: &Layout, first: u32, contents: &[u8]) -> Outcome;

    /// As [`fill`](Self::fill), with what a source's window shows: the kernel copies it, and nobody reads it first. Where the
    /// window shows nothing, it stops with [`Stop::Hole`].
    fn fill_window(&self, layout: &Layout, first: u32, contents: Window<'_>) -> Outcome;

    /// Whether [`fill`](Self::fill) exposes too.
    fn fill_exposes(&self) -> bool;

    /// Whether the memory may hold something at a page that nobody has brought. [`zero`](Self::zero) stops there, and does not expose it.
    fn may_hold_anything(&self) -> bool {
        !self.fill_exposes()
    }

    /// Puts zero pages where there is nothing, and exposes them.
    fn zero(&self, layout: &Layout, pages: Range<u32>) -> Outcome;

    /// How many pages, from the first on, read as zero as they are, and are exposed to nobody by this. What may hold something is
    /// [`Stop::AlreadyThere`].
    fn blank(&self, _layout: &Layout, _pages: Range<u32>) -> Outcome {
        Outcome { pages: 0, stopped: Some(Stop::AlreadyThere) }
    }

    /// Lets the guest see pages that are filled. A page that the guest sees already is [`Stop::AlreadyThere`]; one that was
    /// taken away unnoticed becomes what its memory now holds: zero, or the file's contents.
    fn expose(&self, layout: &Layout, pages: Range<u32>) -> Outcome;

    /// Lets writes through to a page that was write-protected, and releases who waits to write.
    fn unprotect(&self, layout: &Layout, page: u32) -> Outcome;

    /// Makes every access to the pages an error (UFFDIO_POISON, Linux 6.6 and later).
    fn poison(&self, layout: &Layout, pages: Range<u32>) -> Outcome;

    /// Ends fault reporting for these pages, which may lie in several regions: all that are installed by this.
    ///
    /// # Errors
    /// The errno of UFFDIO_UNREGISTER.
    fn detach(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno>;

    /// Whether the guest's memory still exists.
    fn has_memory(&self) -> bool;

    /// Whether [`has_memory`](Self::has_memory) can tell. If not, the VM lives as long as its process.
    fn knows_memory(&self) -> bool {
        true
    }

    /// Whether a thread of the VMM is in the middle of a discard whose event someone must read.
    fn is_changing(&self) -> bool;
}
