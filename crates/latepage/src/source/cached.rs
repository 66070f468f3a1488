//! Which of a memory file is in memory, and which of its data is zero: known before a fault asks, so that nobody need call the
//! kernel to find out.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;

use crate::memory::Bitmap;
use crate::sys::file;
use crate::sys::mapping::Mapping;

use super::AtHand;
use super::file::Opened;

/// What the bits stand for.
pub(super) const PAGE: u64 = 4096;
/// Looked at in one go.
pub(super) const STRETCH: u64 = 2 << 20;

/// Pages that are looked at where there is doubt.
const SAMPLES: usize = 64;

/// The file in our address space. Only the kernel reads through it.
#[derive(Debug)]
pub(super) struct Cached {
    view: Mapping,
    /// Pages that were found in the page cache, all of them known.
    there: Bitmap,
    /// Pages of which it is known whether they are zero, and those that are.
    known: Bitmap,
    zero: Arc<Bitmap>,
}

/// Buffers of whoever looks.
pub(super) struct Looking {
    resident: Box<[u8]>,
    bytes: Box<[u8]>,
}

impl Looking {
    pub(super) fn new() -> Self {
        let buffer = |length: u64| vec![0; length as usize].into_boxed_slice();
        Self { resident: buffer(STRETCH / PAGE), bytes: buffer(STRETCH) }
    }
}

impl Cached {
    /// `None` where it cannot be mapped, or where the kernel does not tell us what is in memory: then nothing is at hand.
    pub(super) fn new(file: &Opened, zero: Arc<Bitmap>) -> Option<Self> {
        let pages = (file.size / PAGE) as usize;
        if pages == 0
            || rustix::param::page_size() as u64 != PAGE
            || !file::tells_what_is_cached(file.fd.as_fd())
        {
            return None;
        }
        let view = Mapping::read_only(file.fd.as_fd(), pages * PAGE as usize).ok()?;
        // What is looked at shall not draw more of a cold file into memory than was there.
        view.read_nothing_ahead().ok()?;
        Some(Self { view, there: Bitmap::new(pages), known: Bitmap::new(pages), zero })
    }

    /// What is at hand from `offset` on, in whole units: of `length` bytes that all are data.
    pub(super) fn at_hand(&self, offset: u64, length: u64, unit: u64) -> Option<AtHand<'_>> {
        let (step, start) = ((unit / PAGE) as usize, (offset / PAGE) as usize);
        let end = start + (length / PAGE) as usize;
        let whole = |run: usize| (run - start) / step * step;
        let zero = whole(self.zero.run(start..end, true));
        if zero > 0 {
            return Some(AtHand::Zero(zero as u64 * PAGE));
        }
        let there = whole(self.there.run(start..end, true));
        // It goes up to the first unit that is all zero.
        let mut contents = step;
        while contents < there
            && self.zero.run(start + contents..start + contents + step, true) < start + contents + step
        {
            contents += step;
        }
        (there > 0).then(|| AtHand::Contents(self.view.window(offset as usize, contents * PAGE as usize)))
    }

    /// Unmaps all of it: what nobody has mapped can be evicted, by whoever wants that, and comes back page by page.
    pub(super) fn unmap(&self) {
        let _ = self.view.dont_need(0, self.view.len());
    }

    /// Looks at a few pages of those that were there, spread over the file. Had one gone, nothing counts as there any more: somebody
    /// has emptied the page cache while nobody looked.
    pub(super) fn doubt(&self) {
        let pages = self.view.len() / PAGE as usize;
        let step = pages.div_ceil(SAMPLES);
        for part in (0..pages).step_by(step) {
            let page = self.there.run(part..(part + step).min(pages), false);
            if page < (part + step).min(pages) {
                let bytes = page * PAGE as usize..(page + 1) * PAGE as usize;
                if self.view.resident(bytes, &mut [0]).map_or(true, |found| found[0] & 1 == 0) {
                    return self.there.fill(0..pages, false);
                }
            }
        }
    }

    /// Looks at a stretch of the file, all of it data: learns what has come into memory, forgets what has gone. What was found counts
    /// only if `still` says afterwards that the file is the one that was opened.
    pub(super) fn look(
        &self,
        file: &Opened,
        range: Range<u64>,
        with: &mut Looking,
        still: impl Fn() -> bool,
    ) {
        debug_assert!(range.end - range.start <= STRETCH);
        let (start, end) = ((range.start / PAGE) as usize, (range.end / PAGE) as usize);
        let bytes = start * PAGE as usize..end * PAGE as usize;
        let Ok(resident) = self.view.resident(bytes, &mut with.resident) else {
            return self.there.fill(start..end, false);
        };
        let mut at = start;
        while at < end {
            let is = resident[at - start] & 1 == 1;
            let same = |page: &usize| (resident[*page - start] & 1 == 1) != is;
            let run = at..(at..end).find(same).unwrap_or(end);
            at = run.end;
            if is {
                self.came(file, run, &mut with.bytes, &still);
            } else {
                self.there.fill(run, false);
            }
        }
    }

    /// Pages are in memory: those of which that was not known are looked at for zeros, once.
    fn came(&self, file: &Opened, pages: Range<usize>, buffer: &mut [u8], still: impl Fn() -> bool) {
        let mut at = pages.start;
        while at < pages.end {
            at = self.known.run(at..pages.end, true);
            let new = at..self.known.run(at..pages.end, false);
            let read = new.start..new.start + self.read(file, &new, buffer) / PAGE as usize;
            if !read.is_empty() && still() {
                for (page, contents) in read.clone().zip(buffer.chunks_exact(PAGE as usize)) {
                    if all_zero(contents) {
                        self.zero.fill(page..page + 1, true);
                    }
                }
                self.known.fill(read, true);
            }
            at = new.end;
        }
        // After what is known of it: whoever sees that it is there sees that, too.
        let mut at = pages.start;
        while at < pages.end {
            let known = at..self.known.run(at..pages.end, true);
            self.there.fill(known.clone(), true);
            at = self.known.run(known.end..pages.end, false);
        }
    }

    /// Reads pages that are in memory, so that this does not wait for long; should they have gone again, it reads them. Returns how
    /// many bytes could be had.
    fn read(&self, file: &Opened, pages: &Range<usize>, buffer: &mut [u8]) -> usize {
        if pages.is_empty() {
            return 0;
        }
        let (from, buffer) = (pages.start * PAGE as usize, &mut buffer[..pages.len() * PAGE as usize]);
        match self.view.window(from, buffer.len()).copy_to(buffer) {
            // A sandbox may forbid it.
            Err(Errno::PERM | Errno::NOSYS) => file::read(file.fd.as_fd(), buffer, from as u64),
            copied => copied,
        }
        .unwrap_or(0)
    }
}

/// Whether a page is all zero. Most others show it in their first words.
fn all_zero(page: &[u8]) -> bool {
    page[..8].iter().all(|byte| *byte == 0)
        && page.chunks_exact(64).all(|line| line.iter().fold(0, |seen, byte| seen | byte) == 0)
}
