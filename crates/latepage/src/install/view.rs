//! The install view: guest memory's file, mapped a second time, where writing never faults.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::{Outcome, Stop};
use crate::memory::Layout;
use crate::sys::mapping::{MapError, Mapping, Window};
use crate::sys::uffd::Installed;

/// The install view: guest memory's file, mapped a second time.
#[derive(Debug)]
pub struct InstallView {
    mapping: Mapping,
    /// The file once more, by an open of our own: the sender's could be set to append, which pwrite(2) obeys. `None` where
    /// there is no /proc to open it by.
    file: Option<OwnedFd>,
}

impl InstallView {
    /// Maps a second view of `memory`, which must be sealed against shrinking, as far as `layout` reaches.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map(memory: &OwnedFd, layout: &Layout) -> Result<Self, MapError> {
        let mapping = Mapping::shared(memory.as_fd(), 0, layout.end() as usize)?;
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok();
        Ok(Self { mapping, file })
    }

    pub(super) fn fill(&self, layout: &Layout, first: u32, contents: &[u8]) -> Outcome {
        let place = layout.place(first);
        self.mapping.write(place.offset as usize, contents);
        Outcome { pages: (contents.len() as u64 / place.page_size.bytes()) as u32, stopped: None }
    }

    /// By pwrite(2): one copy, and neither a fault on the install view nor a page that is zeroed first.
    pub(super) fn fill_window(&self, layout: &Layout, first: u32, contents: Window<'_>) -> Outcome {
        let place = layout.place(first);
        let written = match &self.file {
            Some(file) => contents.write_to(file.as_fd(), place.offset),
            None => Err(Errno::FAULT),
        };
        let (bytes, stopped) = match written {
            Ok(bytes) => (bytes as u64, (bytes < contents.len()).then_some(Errno::FAULT)),
            Err(errno) => (0, Some(errno)),
        };
        Outcome::new(Installed { bytes, stopped }, place.page_size.bytes())
    }

    /// How many pages of the run the file has nothing of, from the first on: they read as zero. What it has something of may be
    /// anything, and is [`Stop::AlreadyThere`].
    pub(super) fn holes(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        let (place, count) = (layout.place(pages.start), pages.end - pages.start);
        let data = match &self.file {
            Some(file) => rustix::fs::seek(file, SeekFrom::Data(place.offset)),
            None => Ok(place.offset),
        };
        let before = match data {
            Ok(data) => {
                ((data.saturating_sub(place.offset)) / place.page_size.bytes()).min(count.into()) as u32
            }
            // Nothing from here on.
            Err(Errno::NXIO) => count,
            Err(_) => 0,
        };
        Outcome { pages: before, stopped: (before < count).then_some(Stop::AlreadyThere) }
    }
}
