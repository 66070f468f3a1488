//! A memory file: the snapshot of a VM's memory as one regular file.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use crate::memory::Layout;
use crate::sys::file;

use super::cached::{self, Cached};
use super::cold::Cold;
use super::extents::{Extent, Extents};
use super::lease::{Guard, Readable};
use super::opened::Opened;
use super::scan::Keeping;
use super::survey::{Survey, Surveyed};
use super::{Answer, AtHand, FileExtent, Source, SourceError, SourceNotice};

/// A regular file, read by preadv2(2). Its holes are answered without reading; while it is served a read lease holds
/// writers back, where one is granted (see `docs/source.md`).
#[derive(Debug)]
pub struct FileSource {
    pub(super) file: Arc<Opened>,
    pub(super) extents: Arc<Extents>,
    at_once: AtOnce,
    pub(super) guard: Guard,
    pub(super) keeping: Arc<Keeping>,
    at_hand: Option<(Arc<Cached>, Survey)>,
    cold: Cold,
}

/// How a page is had without waiting for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AtOnce {
    /// From the page cache, and the kernel says so if it is not there.
    Cached,
    /// It is in memory by its nature (tmpfs).
    Memory,
    /// The file system cannot tell: every page is asked for with `wait`.
    Never,
}

impl FileSource {
    /// Opens a memory file, finds its holes, and takes a read lease if it can.
    ///
    /// # Errors
    /// [`SourceError`]: there is none, it cannot be read, it is no regular file, it is empty.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, SourceError> {
        Self::open_with(path.as_ref().to_owned(), Guard::new, None)
    }

    pub(super) fn open_with(
        path: PathBuf,
        guard: impl FnOnce(Arc<Opened>) -> Guard,
        zero_maps: Option<&Path>,
    ) -> Result<Self, SourceError> {
        let opened = Opened::open(path)?;
        let (fd, size) = (opened.fd.as_fd(), opened.size);
        // At the end: anywhere else the kernel would read ahead for that.
        let at_once = match file::read_cached(fd, &mut [0], size) {
            Ok(_) | Err(Errno::AGAIN) => AtOnce::Cached,
            Err(Errno::OPNOTSUPP) if file::lives_in_memory(fd) => AtOnce::Memory,
            Err(Errno::OPNOTSUPP) => AtOnce::Never,
            Err(errno) => return Err(SourceError::Read { path: opened.path, offset: 0, errno }),
        };
        let opened = Arc::new(opened);
        // The lease first: the holes are those of a file that nobody writes.
        let guard = guard(Arc::clone(&opened));
        if let Some(how) = opened.difference() {
            return Err(SourceError::Changed { path: opened.path.clone(), how });
        }
        let extents = Extents::find(opened.fd.as_fd(), size).map_err(|errno| SourceError::Read {
            path: opened.path.clone(),
            offset: 0,
            errno,
        })?;
        let extents = Arc::new(extents);
        let keeping = Arc::new(Keeping::new(&opened, guard.trust(), zero_maps));
        // Without a lease somebody may cut a page in two, of which a mapping then shows the rest as zero.
        let cached = if guard.is_leased() && at_once != AtOnce::Never {
            Cached::new(&opened, Arc::clone(&keeping.zeros))
        } else {
            None
        };
        let at_hand = cached.map(|cached| {
            let (file, extents, cached) = (Arc::clone(&opened), Arc::clone(&extents), Arc::new(cached));
            let (for_thread, keeping) = (Arc::clone(&cached), Arc::clone(&keeping));
            let of = Surveyed { file, extents, cached: for_thread, keeping, trust: guard.trust() };
            (cached, Survey::start(of))
        });
        let cached = at_hand.as_ref().map(|(cached, _)| Arc::clone(cached));
        let cold = Cold::new(Arc::clone(&opened), Arc::clone(&extents), cached, guard.trust());
        Ok(Self { file: opened, extents, at_once, guard, keeping, at_hand, cold })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Whether a read lease holds writers back now.
    pub fn has_lease(&self) -> bool {
        self.guard.has_lease()
    }

    /// What is to be done for a range: zero, or a read. It covers whole units.
    fn plan(&self, offset: u64, length: usize, unit: usize) -> Result<Plan, SourceError> {
        let size = self.file.size;
        let (unit, length) = (unit as u64, length as u64);
        debug_assert!(unit > 0 && length >= unit, "at least one unit is asked for");
        if offset.checked_add(unit).is_none_or(|end| end > size) {
            return Err(SourceError::Beyond { path: self.file.path.clone(), offset, length, size });
        }
        let most = length.min(size - offset) / unit * unit;
        Ok(match self.extents.at(offset) {
            Extent::Hole(end) if end - offset >= unit => Plan::Zero(((end - offset) / unit * unit).min(most)),
            // A hole that is smaller than a unit is read with what follows it, the rest of a unit with the hole after it.
            Extent::Hole(_) => Plan::Read(unit as usize),
            Extent::Data(end) => match self.known_zero(offset, (end - offset).min(most), unit) {
                0 => Plan::Read((end - offset).next_multiple_of(unit).min(most) as usize),
                zero => Plan::Zero(zero),
            },
        })
    }

    /// Whether a page is not in memory and not on its way there, as of the last look.
    fn is_cold(&self, offset: u64) -> bool {
        let missing = |cached: &Cached| !cached.is_there(&(offset..offset + cached::PAGE));
        self.at_once == AtOnce::Cached
            && self.guard.is_leased()
            && self.at_hand.as_ref().is_some_and(|(cached, survey)| survey.has_looked() && missing(cached))
            && !self.cold.is_coming(offset)
    }

    /// How many bytes of data from `offset` on are known to be zero, in whole units.
    fn known_zero(&self, offset: u64, length: u64, unit: u64) -> u64 {
        let (start, end) = (offset / cached::PAGE, (offset + length) / cached::PAGE);
        let run = self.keeping.zeros.zero.run(start as usize..end as usize, true) as u64;
        (run - start) * cached::PAGE / unit * unit
    }

    /// Waits until what is in memory now is known to be.
    #[cfg(test)]
    pub(super) fn wait_surveyed(&self) -> bool {
        self.at_hand.as_ref().map(|(_, survey)| survey.wait()).is_some()
    }

    /// Reads whole units from the start of the range: how many bytes, or 0 if the first is not to be had now.
    fn read(
        &self,
        offset: u64,
        unit: usize,
        scratch: &mut [u8],
        at_once: bool,
    ) -> Result<usize, SourceError> {
        let fd = self.file.fd.as_fd();
        let mut done = 0;
        while done < unit {
            let at = offset + done as u64;
            let read = match at_once {
                true if self.at_once == AtOnce::Cached => file::read_cached(fd, &mut scratch[done..], at),
                _ => file::read(fd, &mut scratch[done..], at),
            };
            match read {
                // Admission and `plan` keep within the size that the file had, so it has another one now.
                Ok(0) => {
                    return Err(SourceError::Truncated {
                        path: self.file.path.clone(),
                        offset: at,
                        size: self.file.size,
                    });
                }
                Ok(read) => done += read,
                Err(Errno::AGAIN | Errno::OPNOTSUPP) if at_once => return Ok(0),
                Err(errno) => {
                    return Err(SourceError::Read { path: self.file.path.clone(), offset: at, errno });
                }
            }
        }
        Ok(done / unit * unit)
    }

    fn answer<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
        at_once: bool,
    ) -> Result<Answer<'a>, SourceError> {
        let answer = match self.plan(offset, length, unit)? {
            Plan::Zero(bytes) => Answer::Zero(bytes),
            Plan::Read(_) if at_once && self.at_once == AtOnce::Never => return Ok(Answer::Later),
            Plan::Read(bytes) => match self.read(offset, unit, &mut scratch[..bytes], at_once)? {
                0 => return Ok(Answer::Later),
                bytes => Answer::Bytes(&scratch[..bytes]),
            },
        };
        // After the read: what was read before a writer was let in is the snapshot's.
        match if at_once { self.guard.readable() } else { self.guard.wait_readable() } {
            Readable::Yes => Ok(answer),
            Readable::Later => Ok(Answer::Later),
            Readable::No => Err(SourceError::OpenedForWriting { path: self.file.path.clone() }),
        }
    }
}

enum Plan {
    Zero(u64),
    Read(usize),
}

impl Source for FileSource {
    fn describe(&self) -> String {
        format!("memory file {}", self.file.path.display())
    }

    fn size(&self) -> u64 {
        self.file.size
    }

    fn ask<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        // Asked for it, the kernel would read ahead on this very thread. But zero needs no reading.
        if matches!(self.plan(offset, length, unit)?, Plan::Read(_)) && self.is_cold(offset) {
            return Ok(Answer::Later);
        }
        self.answer(offset, length, unit, scratch, true)
    }

    fn at_hand(&self, offset: u64, length: usize, unit: usize) -> Option<AtHand<'_>> {
        let (unit, size) = (unit as u64, self.file.size);
        let most = (length as u64).min(size.checked_sub(offset)?) / unit * unit;
        match self.extents.at(offset) {
            _ if most == 0 => None,
            Extent::Hole(end) => {
                let zero = most.min((end - offset) / unit * unit);
                (zero > 0 && self.guard.readable() == Readable::Yes).then_some(AtHand::Zero(zero))
            }
            // A unit that is data and hole is read: mapped, a hole of a file in tmpfs would take memory.
            Extent::Data(end) => match most.min((end - offset) / unit * unit) {
                0 => None,
                data => {
                    self.cold.touched(offset);
                    let (cached, _) = self.at_hand.as_ref().filter(|_| self.guard.is_leased())?;
                    cached.at_hand(offset, data, unit)
                }
            },
        }
    }

    fn extent(&self, offset: u64, length: usize, unit: usize) -> Option<FileExtent<'_>> {
        match self.plan(offset, length, unit) {
            Ok(Plan::Read(length)) if self.at_once == AtOnce::Cached => {
                Some(FileExtent { file: self.file.fd.as_fd(), offset, length })
            }
            _ => None,
        }
    }

    fn missed(&self, offset: u64) {
        if offset < self.file.size {
            self.cold.missed(offset);
        }
    }

    fn vouch(&self) -> Result<(), SourceError> {
        // A lease that was not looked at for long is looked at now: a lock and two system calls, after a minute's standstill.
        match self.guard.wait_readable() {
            Readable::Yes => Ok(()),
            Readable::Later | Readable::No => {
                Err(SourceError::OpenedForWriting { path: self.file.path.clone() })
            }
        }
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        let answer = self.answer(offset, length, unit, scratch, false);
        if self.at_once == AtOnce::Cached && matches!(answer, Ok(Answer::Bytes(_))) {
            self.cold.missed(offset);
        }
        answer
    }

    fn wait_ahead<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        let end = offset.saturating_add(length as u64).min(self.file.size);
        let there = |cached: &Cached| cached.is_there(&(offset..end));
        if offset < end
            && self.at_once == AtOnce::Cached
            && !self.at_hand.as_ref().is_some_and(|(cached, _)| there(cached))
        {
            self.cold.populating(offset);
        }
        self.answer(offset, length, unit, scratch, false)
    }

    fn check(&self) -> Vec<SourceNotice> {
        if let Some((_, survey)) = &self.at_hand
            && self.guard.is_needed()
        {
            survey.look();
        }
        let mut notices = self.guard.check();
        notices.append(&mut self.keeping.notices());
        notices
    }

    fn admit(&self, layout: &Layout) -> Result<(), SourceError> {
        let (source, vm) = (self.size(), layout.end());
        if source != vm {
            return Err(SourceError::Size { what: self.describe(), source_bytes: source, vm_bytes: vm });
        }
        self.guard.admit()?;
        if let Some((cached, survey)) = &self.at_hand
            && survey.serve()
        {
            cached.doubt();
        }
        Ok(())
    }

    fn filled(&self) {
        self.guard.filled();
        self.idle();
    }

    fn idle(&self) {
        if let Some((_, survey)) = &self.at_hand {
            survey.rest();
        }
        self.cold.rest();
    }
}
