//! Where a page's contents come from: the trait, a memory file, and a queue of requests that other threads answer.
//!
//! A [`Source`] says at once what it has at hand ([`Answer::Bytes`]), that a range is zero without reading it
//! ([`Answer::Zero`]), or that it would have to wait ([`Answer::Later`]): then the pager asks again on an I/O thread with
//! [`Source::wait`]. So a cold page of one VM never delays a hot fault of another. What a source cannot supply is a
//! [`SourceError`], never a zero page.
//!
//! A source knows nothing of userfaultfd, of sessions, or of how contents get into a guest. See `docs/source.md`.

mod ahead;
mod cached;
mod cold;
mod error;
mod extents;
mod file;
mod lease;
mod notice;
mod opened;
pub mod queue;
mod scan;
mod survey;
#[cfg(test)]
mod tests;
mod zeros;

pub(crate) use self::cached::all_zero;
pub use self::error::SourceError;
pub use self::file::FileSource;
pub use self::notice::{NoLease, SourceNotice};
pub use self::scan::Scan;

use std::os::fd::BorrowedFd;

use crate::memory::Layout;
use crate::sys::mapping::Window;

/// What a source answers. It covers a prefix of what was asked: a positive multiple of the asker's unit, never more than
/// the length asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer<'a> {
    /// The contents, in the asker's scratch or in memory of the source itself.
    Bytes(&'a [u8]),
    /// That many bytes, all zero. They were not read, and need not be copied.
    Zero(u64),
    /// It would have to wait: ask again with [`Source::wait`], on a thread that may.
    Later,
}

/// Contents that lie where the kernel can copy them from: nobody need read them first.
#[derive(Debug, Clone, Copy)]
pub enum AtHand<'a> {
    /// They are in a mapping of the source's, in memory, and not known to be zero.
    Contents(Window<'a>),
    /// That many bytes, known to be zero.
    Zero(u64),
}

/// Where contents lie in a file.
#[derive(Debug, Clone, Copy)]
pub struct FileExtent<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Bytes from its start.
    pub offset: u64,
    /// Bytes.
    pub length: usize,
}

/// On which of a pager's threads a source is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lane {
    /// On those that all sources share: for one whose answers take about as long as a device's.
    #[default]
    Shared,
    /// On threads of its own, so that however long it takes, and should it never answer, only its own VMs wait.
    Own {
        /// Threads that wait for pages that a fault asked for: so many requests are under way at once.
        readers: usize,
        /// Threads that wait for pages that nobody has asked for yet: so many VMs are populated at once.
        populators: usize,
    },
}

/// Supplies the contents of guest memory.
///
/// Offsets are in bytes from the start of the snapshot. `unit` is the asker's page size in bytes (4096, or 2 MiB for
/// hugetlb): `offset` and `length` are multiples of it, `length` is at least one unit, and the scratch holds at least
/// `length` bytes.
///
/// # Example
/// ```
/// use latepage::source::{Answer, FileSource, Source};
///
/// let path = std::env::temp_dir().join(format!("latepage-doc-{}", std::process::id()));
/// std::fs::write(&path, [7; 8192])?;
/// let source = FileSource::open(&path)?;
/// let mut scratch = [0; 4096];
/// assert_eq!(source.wait(4096, 4096, 4096, &mut scratch)?, Answer::Bytes(&[7; 4096]));
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Source: Send + Sync {
    /// What it is, for log lines: a path, a reference to an image, a host.
    fn describe(&self) -> String;

    /// Bytes of memory that it holds.
    fn size(&self) -> u64;

    /// Answers from what is at hand. It never blocks, never allocates, and takes no lock that is held across I/O.
    ///
    /// # Errors
    /// What cannot be supplied, now or ever: see [`SourceError`].
    fn ask<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError>;

    /// What [`ask`](Self::ask) would answer, as far as it lies in memory where the kernel can copy it from; `None` where it does
    /// not, and then `ask` is asked. It covers a prefix of the range, in whole units, as an answer does. Never blocks, never
    /// allocates, makes no system call.
    ///
    /// Whoever has installed what it shows calls [`vouch`](Self::vouch) afterwards.
    fn at_hand(&self, offset: u64, length: usize, unit: usize) -> Option<AtHand<'_>> {
        let _ = (offset, length, unit);
        None
    }

    /// Whether all that was copied from the source's windows, or read from its extents, until now was what it should be. Never blocks, never allocates.
    ///
    /// # Errors
    /// Why not: then what was installed since the last time that it was must not be believed.
    fn vouch(&self) -> Result<(), SourceError> {
        Ok(())
    }

    /// Where the range lies in a file, so that whoever is to wait for it can read it there himself: whole units, from the start of
    /// the range on. `None` where it does not, or is zero; then [`wait`](Self::wait) answers. Never blocks, never allocates.
    ///
    /// Whoever has read it calls [`missed`](Self::missed), and [`vouch`](Self::vouch), which covers this too.
    fn extent(&self, offset: u64, length: usize, unit: usize) -> Option<FileExtent<'_>> {
        let _ = (offset, length, unit);
        None
    }

    /// A page that a guest waited for was not in memory, and has been read from an [`extent`](Self::extent). Never waits for a device.
    fn missed(&self, offset: u64) {
        let _ = offset;
    }

    /// Answers, waiting as long as it takes. Called on threads that may block; never [`Answer::Later`].
    ///
    /// # Errors
    /// What cannot be supplied: see [`SourceError`].
    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError>;

    /// As [`wait`](Self::wait), for pages that nobody waits for yet: a source that must choose serves the others first.
    ///
    /// # Errors
    /// What cannot be supplied: see [`SourceError`].
    fn wait_ahead<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.wait(offset, length, unit, scratch)
    }

    /// On which threads a pager is to wait for it. Asked once, when it is listened with.
    fn lane(&self) -> Lane {
        Lane::Shared
    }

    /// The pager that it was given to has ended: whoever is inside [`wait`](Self::wait) comes back with an error, as soon as
    /// can be, and so does whoever calls it afterwards. A source with a lane of its own should see to that; the threads of one
    /// that does not are left behind after some seconds.
    fn close(&self) {}

    /// Looks after itself, about once a second and off the path of a fault. Each notice is given once.
    fn check(&self) -> Vec<SourceNotice> {
        Vec::new()
    }

    /// Whether a VM with this layout can be served from it.
    ///
    /// # Errors
    /// [`SourceError::Size`] with both sizes, or why nobody can be served any more.
    fn admit(&self, layout: &Layout) -> Result<(), SourceError> {
        let (source, vm) = (self.size(), layout.end());
        if source == vm {
            Ok(())
        } else {
            Err(SourceError::Size { what: self.describe(), source_bytes: source, vm_bytes: vm })
        }
    }

    /// Every VM served from it has all that it needs: what the source keeps from others for their sake may be let go.
    fn filled(&self) {}

    /// No VM is served from it just now, as it seems: another may be coming. What is kept in memory for their sake need not be.
    fn idle(&self) {}
}
