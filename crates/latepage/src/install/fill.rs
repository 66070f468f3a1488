//! Filling alone: for guests whose VMM exposes the pages itself, or does so by a bitmap.

use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Install, InstallView, Outcome};
use crate::memory::Layout;
use crate::sys::mapping::Window;

/// Installs by writing through a second view of the guest's memory file, and exposes nothing: whoever waits is told by its delivery
/// which pages were filled, and exposes them.
///
/// A page that cannot be had is one that its waiter is told of: nothing else can be done to it from here.
pub struct FillInstall {
    view: Arc<InstallView>,
}

impl FillInstall {
    /// Into the file of which `view` is the install view.
    pub fn new(view: impl Into<Arc<InstallView>>) -> Self {
        Self { view: view.into() }
    }
}

fn all(pages: &Range<u32>) -> Outcome {
    Outcome { pages: pages.end - pages.start, stopped: None }
}

impl Install for FillInstall {
    fn fill(&self, layout: &Layout, first: u32, contents: &[u8]) -> Outcome {
        self.view.fill(layout, first, contents)
    }

    fn fill_window(&self, layout: &Layout, first: u32, contents: Window<'_>) -> Outcome {
        self.view.fill_window(layout, first, contents)
    }

    fn fill_exposes(&self) -> bool {
        false
    }

    /// What the file has nothing of is zero. What it has something of is not touched: the guest may have written it.
    fn zero(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.view.holes(layout, pages)
    }

    fn blank(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.view.holes(layout, pages)
    }

    fn expose(&self, _: &Layout, pages: Range<u32>) -> Outcome {
        all(&pages)
    }

    fn unprotect(&self, _: &Layout, page: u32) -> Outcome {
        all(&(page..page + 1))
    }

    fn poison(&self, _: &Layout, pages: Range<u32>) -> Outcome {
        all(&pages)
    }

    fn detach(&self, _: &Layout, _: Range<u32>) -> Result<(), Errno> {
        Ok(())
    }

    fn has_memory(&self) -> bool {
        true
    }

    fn knows_memory(&self) -> bool {
        false
    }

    fn is_changing(&self) -> bool {
        false
    }
}
