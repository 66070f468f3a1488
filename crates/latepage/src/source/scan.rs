//! Zero maps on the disk: loaded when a file is opened, kept when something new is known, and made by looking at all of a file.

use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustix::fs::Advice;

use crate::sys::file;
use crate::sys::mapping::Mapping;

use super::cached::{PAGE, STRETCH, all_zero};
use super::lease::{Guard, Trust};
use super::opened::Opened;
use super::zeros::{MapError, Zeros};
use super::{FileSource, SourceError, SourceNotice};

/// What is known of a file's zero pages, and where that is kept.
#[derive(Debug)]
pub(super) struct Keeping {
    pub(super) zeros: Arc<Zeros>,
    /// How many pages were known from a zero map.
    pub(super) loaded: u64,
    /// The zero map; `None` where none is wanted.
    pub(super) place: Option<PathBuf>,
    file: Arc<Opened>,
    trust: Trust,
    /// It could not be written: that is told once, and not tried again.
    failed: AtomicBool,
    notices: Mutex<Vec<SourceNotice>>,
}

impl Keeping {
    /// Learns what a zero map in `folder` says, if there is one that can be believed.
    pub(super) fn new(file: &Arc<Opened>, trust: Trust, folder: Option<&Path>) -> Self {
        let zeros = Arc::new(Zeros::new((file.size / PAGE) as usize));
        let identity = file.identity().filter(|_| trust.is_leased());
        let place = folder.zip(identity).map(|(folder, of)| folder.join(format!("{}.map", of.name())));
        let mut keeping = Self {
            zeros,
            loaded: 0,
            place,
            file: Arc::clone(file),
            trust,
            failed: AtomicBool::new(false),
            notices: Mutex::default(),
        };
        if let Some((place, of)) = keeping.place.as_ref().zip(identity) {
            match keeping.zeros.load(place, &of) {
                Ok(_) => keeping.loaded = keeping.zeros.known.count(),
                Err(error) => keeping.tell(place, format!("{error}; it is not believed, and made again")),
            }
        }
        keeping
    }

    /// Keeps what has become known, if there is anything new. Never fails: what cannot be kept is found anew another time.
    pub(super) fn keep(&self) {
        if !self.failed.load(Ordering::Relaxed) && self.zeros.has_news() {
            match self.try_to_keep() {
                Ok(_) | Err(MapError::Content(_)) => {}
                Err(error) => {
                    self.failed.store(true, Ordering::Relaxed);
                    if let Some(place) = &self.place {
                        self.tell(place, format!("it cannot be written: {error}"));
                    }
                }
            }
        }
    }

    fn try_to_keep(&self) -> Result<&Path, MapError> {
        let place =
            self.place.as_ref().ok_or(MapError::Content("there is no read lease on the memory file"))?;
        let of = self.file.identity().ok_or(MapError::Content("the memory file was changed"))?;
        // After that look: whatever was learnt was learnt of the file that has this identity.
        if !self.trust.is_leased() {
            return Err(MapError::Content("there is no read lease on the memory file"));
        }
        self.zeros.save(place, &of, SystemTime::now())?;
        Ok(place)
    }

    fn tell(&self, map: &Path, what: String) {
        let notice = SourceNotice::ZeroMap { path: self.file.path.clone(), map: map.to_owned(), what };
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).push(notice);
    }

    pub(super) fn notices(&self) -> Vec<SourceNotice> {
        std::mem::take(&mut *self.notices.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What a memory file holds. All in pages of 4 KiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// All of them.
    pub pages: u64,
    /// Those that lie in holes.
    pub holes: u64,
    /// Those that are data, and zero all the same.
    pub zeros: u64,
    /// Where the zero map is, or why there is none.
    pub map: Result<PathBuf, String>,
}

impl FileSource {
    /// As [`open`](Self::open), with a zero map in this folder: what it says is known at once, and what becomes known is kept there.
    ///
    /// # Errors
    /// As of [`open`](Self::open). A zero map that cannot be used is none: [`SourceNotice::ZeroMap`] says why.
    pub fn open_keeping(path: impl AsRef<Path>, folder: &Path) -> Result<Self, SourceError> {
        Self::open_with(path.as_ref().to_owned(), Guard::new, Some(folder))
    }

    /// Looks at every page of which it is not known whether it is zero, and keeps what was found. What was not in the page cache does
    /// not stay there. `go_on` is told how many bytes have been looked at, now and then, and may say that it is enough.
    ///
    /// # Errors
    /// [`SourceError`]: a part of it cannot be read.
    pub fn scan(&self, mut go_on: impl FnMut(u64) -> bool) -> Result<Scan, SourceError> {
        let (size, mut at, mut data) = (self.file.size, 0, 0..0);
        let view = file::tells_what_is_cached(self.file.fd.as_fd())
            .then(|| Mapping::read_only(self.file.fd.as_fd(), size as usize).ok())
            .flatten();
        let reading = self.for_scanning();
        let fd = reading.as_ref().map_or(self.file.fd.as_fd(), AsFd::as_fd);
        let mut buffer = vec![0; STRETCH as usize].into_boxed_slice();
        // Without a lease what is found is counted, and believed by nobody.
        let zeros = match self.guard.is_leased() {
            true => Arc::clone(&self.keeping.zeros),
            false => Arc::new(Zeros::new((size / PAGE) as usize)),
        };
        let mut pages_of_data = 0;
        while let Some(found) = self.extents.data_from(at) {
            let stretch = found.start..found.end.min((found.start / STRETCH + 1) * STRETCH);
            at = stretch.end;
            // Whole pages, of which one may belong to two extents.
            let pages = (stretch.start / PAGE).max(data.end)..stretch.end.div_ceil(PAGE).min(size / PAGE);
            if pages.start < pages.end {
                pages_of_data += pages.end - pages.start;
                self.scan_pages(&zeros, fd, pages.clone(), view.as_ref(), &mut buffer)?;
                data = pages;
            }
            if !go_on(at) {
                break;
            }
        }
        let kept = self.keeping.try_to_keep().map(Path::to_owned).map_err(|error| error.to_string());
        let pages = size / PAGE;
        Ok(Scan { pages, holes: pages - pages_of_data, zeros: zeros.zero.count(), map: kept })
    }

    /// The file once more, by an open of its own of which the kernel reads nothing ahead: what it would read would seem to have been
    /// in memory before.
    fn for_scanning(&self) -> Option<OwnedFd> {
        let fd = file::open_again(self.file.fd.as_fd()).ok()?;
        rustix::fs::fadvise(&fd, 0, None, Advice::Random).ok()?;
        Some(fd)
    }

    fn scan_pages(
        &self,
        zeros: &Arc<Zeros>,
        fd: BorrowedFd<'_>,
        pages: Range<u64>,
        view: Option<&Mapping>,
        buffer: &mut [u8],
    ) -> Result<(), SourceError> {
        let mut at = pages.start as usize;
        while at < pages.end as usize {
            let new = zeros.known.run(at..pages.end as usize, true);
            at = zeros.known.run(new..pages.end as usize, false);
            let bytes = new * PAGE as usize..at * PAGE as usize;
            if bytes.is_empty() {
                continue;
            }
            let mut resident = vec![1; at - new];
            if let Some(view) = view {
                // Where it cannot be told, nothing is dropped.
                let _ = view.resident(bytes.clone(), &mut resident);
            }
            let contents = &mut buffer[..bytes.len()];
            self.read_all(fd, bytes.start as u64, contents)?;
            if Arc::ptr_eq(zeros, &self.keeping.zeros) && !self.guard.is_leased() {
                return Err(SourceError::OpenedForWriting { path: self.file.path.clone() });
            }
            let mut from = new;
            for run in resident.chunk_by(|one, next| one & 1 == next & 1) {
                if run[0] & 1 == 0 {
                    let length = NonZeroU64::new(run.len() as u64 * PAGE);
                    let _ = rustix::fs::fadvise(fd, from as u64 * PAGE, length, Advice::DontNeed);
                }
                from += run.len();
            }
            for (page, contents) in (new..).zip(contents.chunks_exact(PAGE as usize)) {
                if all_zero(contents) {
                    zeros.zero.fill(page..page + 1, true);
                }
            }
            zeros.known.fill(new..at, true);
        }
        Ok(())
    }

    fn read_all(&self, fd: BorrowedFd<'_>, offset: u64, into: &mut [u8]) -> Result<(), SourceError> {
        let mut done = 0;
        while done < into.len() {
            match file::read(fd, &mut into[done..], offset + done as u64) {
                Ok(0) => {
                    let (path, offset) = (self.file.path.clone(), offset + done as u64);
                    return Err(SourceError::Truncated { path, offset, size: self.file.size });
                }
                Ok(read) => done += read,
                Err(errno) => {
                    let (path, offset) = (self.file.path.clone(), offset + done as u64);
                    return Err(SourceError::Read { path, offset, errno });
                }
            }
        }
        Ok(())
    }
}
