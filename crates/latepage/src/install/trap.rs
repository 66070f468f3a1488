//! What makes a vCPU's access to an absent page come back to the vCPU's own thread, as a memory-fault exit.
//!
//! Linux has two kinds: a bit for each page in a bitmap that KVM reads ([`PageBitmap`], KVM Userfault), and the memory attribute
//! PRIVATE, which only the VM's own process can set, by an ioctl on KVM's descriptor: a VMM implements that one itself.
//! `docs/userfault.md` compares them.

use std::ops::Range;

use rustix::io::Errno;

use super::PageBitmap;
use crate::memory::Layout;

/// Armed over absent pages, disarmed over those that are there. A run of pages never crosses a region. Any thread may call it at
/// any time, for pages in whatever state.
pub trait Trap: Send + Sync {
    /// Every access by a vCPU to one of these pages exits from now on. Where KVM has a page mapped, that may take more than this:
    /// what must be zapped for it, each trap says.
    ///
    /// # Errors
    /// What the kernel said.
    fn arm(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno>;

    /// Lets vCPUs reach these pages. Who reaches them sees what was written before.
    ///
    /// # Errors
    /// What the kernel said.
    fn disarm(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno>;
}

/// A set bit counts at once for a page that KVM has not mapped. A mapped one must be zapped in the *guest view* after its bit was
/// set: by MADV_REMOVE or fallocate(PUNCH_HOLE), which discard its contents, or by MADV_DONTNEED, which keeps those of shared
/// memory.
impl Trap for PageBitmap {
    fn arm(&self, _: &Layout, pages: Range<u32>) -> Result<(), Errno> {
        self.set(pages);
        Ok(())
    }

    fn disarm(&self, _: &Layout, pages: Range<u32>) -> Result<(), Errno> {
        self.clear(pages);
        Ok(())
    }
}
