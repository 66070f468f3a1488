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
use super::opened::Opened;
use super::zeros::Zeros;

/// What the bits stand for.
pub(super) const PAGE: u64 = 4096;
/// What is looked at of a page before all of it is.
const HEAD: usize = 64;
/// Looked at in one go.
pub(super) const STRETCH: u64 = 2 << 20;

/// Pages that are looked at where there is doubt.
const SAMPLES: usize = 64;

/// The file in our address space. Only the kernel reads through it.
#[derive(Debug)]
pub(super) struct Cached {
    view: Mapping,
    /// Pages that were found in the page cache. Of all of them it is known whether they are zero.
    there: Bitmap,
    /// Pages that have been mapped, so that no copy stops at them. Some may have been unmapped behind our back since.
    mapped: Bitmap,
    zeros: Arc<Zeros>,
}

/// Buffers of whoever looks.
pub(super) struct Looking {
    resident: Box<[u8]>,
    bytes: Box<[u8]>,
}

impl Looking {
    pub(super) fn new() -> Self {
        let buffer = |length: u64| vec![0; length as usize].into_boxed_slice();
        Self { resident: buffer(STRETCH / PAGE), bytes: buffer(STRETCH / PAGE * HEAD as u64 + PAGE) }
    }
}

impl Cached {
    /// `None` where it cannot be mapped, or where the kernel does not tell us what is in memory: then nothing is at hand.
    pub(super) fn new(file: &Opened, zeros: Arc<Zeros>) -> Option<Self> {
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
        Some(Self { view, there: Bitmap::new(pages), mapped: Bitmap::new(pages), zeros })
    }

    /// What is at hand from `offset` on, in whole units: of `length` bytes that all are data.
    pub(super) fn at_hand(&self, offset: u64, length: u64, unit: u64) -> Option<AtHand<'_>> {
        let (step, start) = ((unit / PAGE) as usize, (offset / PAGE) as usize);
        let end = start + (length / PAGE) as usize;
        let whole = |run: usize| (run - start) / step * step;
        let zero = whole(self.zeros.zero.run(start..end, true));
        if zero > 0 {
            return Some(AtHand::Zero(zero as u64 * PAGE));
        }
        let there = whole(self.there.run(start..end, true));
        // It goes up to the first unit that is all zero.
        let mut contents = 0;
        while contents < there {
            contents = (self.zeros.zero.run(start + contents..start + there, false) - start) / step * step;
            if self.zeros.zero.run(start + contents..start + there, true) >= start + contents + step {
                break;
            }
            contents = (contents + step).min(there);
        }
        (there > 0).then(|| {
            let mapped = self.mapped.run(start..start + contents, true) == start + contents;
            AtHand::Contents(self.view.window(offset as usize, contents * PAGE as usize).known_mapped(mapped))
        })
    }

    /// Whether all of a range is there.
    pub(super) fn is_there(&self, range: &Range<u64>) -> bool {
        let (start, end) = ((range.start / PAGE) as usize, (range.end / PAGE) as usize);
        self.there.run(start..end, true) == end
    }

    /// Waits until a stretch of data, or a part of one, has come into memory, and learns of it.
    pub(super) fn draw(
        &self,
        file: &Opened,
        range: Range<u64>,
        with: &mut Looking,
        still: impl Fn() -> bool,
    ) {
        let pages = (range.start / PAGE) as usize..(range.end / PAGE) as usize;
        let seen = self.learn(file, pages, &mut with.bytes, still);
        self.there.fill(seen, true);
    }

    /// Somebody has read this from the file, whole pages from a page's start on: they are in memory, and known.
    pub(super) fn learn_from(&self, offset: u64, contents: &[u8], still: impl Fn() -> bool) {
        let start = (offset / PAGE) as usize;
        let pages = start..start + contents.len() / PAGE as usize;
        if !offset.is_multiple_of(PAGE) || !still() {
            return;
        }
        for (page, contents) in pages.clone().zip(contents.chunks_exact(PAGE as usize)) {
            if all_zero(contents) {
                self.zeros.zero.fill(page..page + 1, true);
            }
        }
        self.zeros.known.fill(pages.clone(), true);
        self.there.fill(pages, true);
    }

    /// Unmaps a range: what nobody has mapped can be evicted, by whoever wants that, and comes back page by page.
    pub(super) fn unmap(&self, range: Range<u64>) {
        let (start, end) = ((range.start / PAGE) as usize, (range.end / PAGE) as usize);
        if start < end {
            self.mapped.fill(start..end, false);
            let _ = self.view.dont_need(start * PAGE as usize, (end - start) * PAGE as usize);
        }
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
    /// only if `still` says afterwards that the file is the one that was opened. Returns whether all of it is in memory.
    pub(super) fn look(
        &self,
        file: &Opened,
        range: Range<u64>,
        with: &mut Looking,
        still: impl Fn() -> bool,
    ) -> bool {
        debug_assert!(range.end - range.start <= STRETCH);
        let (start, end) = ((range.start / PAGE) as usize, (range.end / PAGE) as usize);
        let bytes = start * PAGE as usize..end * PAGE as usize;
        let Ok(resident) = self.view.resident(bytes, &mut with.resident) else {
            self.there.fill(start..end, false);
            return false;
        };
        let mut all = true;
        let mut at = start;
        while at < end {
            let is = resident[at - start] & 1 == 1;
            let same = |page: &usize| (resident[*page - start] & 1 == 1) != is;
            let run = at..(at..end).find(same).unwrap_or(end);
            at = run.end;
            if is {
                self.came(file, run, &mut with.bytes, &still);
            } else {
                all = false;
                self.there.fill(run.clone(), false);
                self.mapped.fill(run, false);
            }
        }
        all
    }

    /// Maps a range of what is in memory in one go, unless it has been.
    pub(super) fn map(&self, range: Range<u64>) {
        let (start, end) = ((range.start / PAGE) as usize, (range.end / PAGE) as usize);
        if start < end && self.mapped.run(start..end, true) < end {
            let _ = self.view.window(start * PAGE as usize, (end - start) * PAGE as usize).map_in();
            self.mapped.fill(start..end, true);
        }
    }

    /// Pages are in memory: those of which that was not known are looked at for zeros, once.
    fn came(&self, file: &Opened, pages: Range<usize>, buffer: &mut [u8], still: impl Fn() -> bool) {
        let mut at = pages.start;
        while at < pages.end {
            at = self.zeros.known.run(at..pages.end, true);
            let new = at..self.zeros.known.run(at..pages.end, false);
            self.learn(file, new.clone(), buffer, &still);
            at = new.end;
        }
        // After what is known of it: whoever sees that it is there sees that, too.
        let mut at = pages.start;
        while at < pages.end {
            let known = at..self.zeros.known.run(at..pages.end, true);
            self.there.fill(known.clone(), true);
            at = self.zeros.known.run(known.end..pages.end, false);
        }
    }

    /// Looks which pages are zero, and returns those of which that is known now. It waits for those that are not in memory.
    fn learn(
        &self,
        file: &Opened,
        pages: Range<usize>,
        buffer: &mut [u8],
        still: impl Fn() -> bool,
    ) -> Range<usize> {
        let nothing = pages.start..pages.start;
        let (heads, rest) = buffer.split_at_mut(pages.len() * HEAD);
        let window = self.view.window(pages.start * PAGE as usize, pages.len() * PAGE as usize);
        let whole = &mut rest[..PAGE as usize];
        let mut is_zero = |page: usize| {
            let read = file::read(file.fd.as_fd(), whole, page as u64 * PAGE);
            read == Ok(PAGE as usize) && all_zero(whole)
        };
        let seen = match window.copy_heads_to(PAGE as usize, HEAD, heads) {
            Ok(bytes) => pages.start..pages.start + bytes / HEAD,
            // A sandbox may forbid it: then all of each page is read.
            Err(Errno::PERM | Errno::NOSYS) => {
                heads.fill(0);
                pages
            }
            Err(_) => return nothing,
        };
        for (page, head) in seen.clone().zip(heads.chunks_exact(HEAD)) {
            // Most pages that are not zero show it here.
            if all_zero(head) && is_zero(page) && still() {
                self.zeros.zero.fill(page..page + 1, true);
            }
        }
        if !still() {
            return nothing;
        }
        self.zeros.known.fill(seen.clone(), true);
        seen
    }
}

/// Whether all of it is zero; a multiple of 64 bytes. Most of what is not shows it in its first line, or its last.
pub(crate) fn all_zero(bytes: &[u8]) -> bool {
    let is_zero = |line: &[u8]| line.iter().fold(0, |seen, byte| seen | byte) == 0;
    let mut lines = bytes.chunks_exact(64);
    lines.next().is_none_or(is_zero) && lines.next_back().is_none_or(is_zero) && lines.all(is_zero)
}
