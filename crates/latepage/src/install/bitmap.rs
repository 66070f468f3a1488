//! A bit for each page: while it is set, an access traps; to clear it exposes the page (KVM_MEM_USERFAULT, or a stand-in for it).

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::{Install, Outcome, Stop};
use crate::memory::Layout;
use crate::sys::mapping::{MapError, Mapping, Window};
use crate::sys::memfd::{self, NotFixed};

/// Bits of guest pages in a memory file that the VMM and the pager share: set, the page is absent.
///
/// The bits of each region begin at a word of their own, since KVM takes a bitmap for each memory slot: bit *i* of region *r* is bit
/// *i* mod 64 of the word *i* / 64 behind [`offset`](Self::offset)`(r)`. The first region's begin at 0, each other one's right
/// behind the one before.
#[derive(Debug)]
pub struct PageBitmap {
    words: Mapping,
    /// The first page of each region, and its offset in bytes.
    regions: Vec<(u32, usize)>,
}

/// A bitmap cannot be used. Each text says why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum BitmapError {
    /// Its memory cannot be trusted to stay, or has another length than the regions' bits.
    #[error(transparent)]
    NotFixed(#[from] NotFixed),
    /// It cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
}

impl PageBitmap {
    /// Bytes of the file that holds the bits of these regions.
    pub fn bytes(layout: &Layout) -> u64 {
        let words = |region| layout.region_pages(region).len().div_ceil(64) as u64;
        (0..layout.regions().len()).map(|region| words(region) * 8).sum()
    }

    /// Makes the file of a bitmap, sealed, with no bit set.
    ///
    /// # Errors
    /// The errno of the call that failed.
    pub fn create(layout: &Layout) -> Result<OwnedFd, Errno> {
        memfd::create_fixed("latepage-bitmap", Self::bytes(layout))
    }

    /// Maps a bitmap that may have come from a stranger.
    ///
    /// # Errors
    /// [`BitmapError`].
    pub fn map(file: impl AsFd, layout: &Layout) -> Result<Self, BitmapError> {
        let (length, needed) = (memfd::check_fixed(file.as_fd())?, Self::bytes(layout));
        if length != needed {
            return Err(NotFixed::Length { length, needed }.into());
        }
        let words = Mapping::shared(file.as_fd(), 0, length as usize)?;
        let mut offset = 0;
        let regions = (0..layout.regions().len())
            .map(|region| {
                let pages = layout.region_pages(region);
                let begins = (pages.start, offset);
                offset += pages.len().div_ceil(64) * 8;
                begins
            })
            .collect();
        Ok(Self { words, regions })
    }

    /// Where the bits of a region begin in the file, in bytes.
    ///
    /// # Panics
    /// Where there is no such region.
    pub fn offset(&self, region: usize) -> usize {
        self.regions[region].1
    }

    /// Where the bits of a region lie in this process: what KVM is told for its memory slot.
    ///
    /// # Panics
    /// Where there is no such region.
    pub fn address(&self, region: usize) -> u64 {
        self.words.address() + self.offset(region) as u64
    }

    /// Whether the page's bit is set.
    pub fn is_set(&self, page: u32) -> bool {
        let (word, bit) = self.place(page);
        self.words.load(word) >> bit & 1 == 1
    }

    /// Sets the bits of a run of pages of one region: each traps from now on, as soon as whoever has it mapped has let go of it.
    pub fn set(&self, pages: Range<u32>) {
        self.each_word(pages, |word, bits| {
            self.words.word(word).fetch_or(bits, Ordering::Release);
        });
    }

    /// Clears the bits of a run of pages of one region: whoever sees that sees what was written there before.
    pub fn clear(&self, pages: Range<u32>) {
        self.each_word(pages, |word, bits| {
            self.words.word(word).fetch_and(!bits, Ordering::Release);
        });
    }

    /// The word of a page's bit, in bytes, and its place there.
    fn place(&self, page: u32) -> (usize, u32) {
        let region = self.regions.partition_point(|(first, _)| *first <= page) - 1;
        let (first, offset) = self.regions[region];
        let bit = page - first;
        (offset + (bit / 64) as usize * 8, bit % 64)
    }

    fn each_word(&self, pages: Range<u32>, mut with: impl FnMut(usize, u64)) {
        let mut at = pages.start;
        while at < pages.end {
            let (word, bit) = self.place(at);
            let bits = (64 - bit).min(pages.end - at);
            with(word, u64::MAX >> (64 - bits) << bit);
            at += bits;
        }
    }
}

/// Installs as another install does, and clears the bits of what that has exposed.
pub struct BitmapInstall {
    inner: Box<dyn Install>,
    bitmap: PageBitmap,
}

impl BitmapInstall {
    /// Over `inner`, which makes a page accessible that has no bit.
    pub fn new(inner: Box<dyn Install>, bitmap: PageBitmap) -> Self {
        Self { inner, bitmap }
    }

    /// Clears the bits of what is exposed, and of the page that was found to be.
    fn exposed(&self, pages: Range<u32>, outcome: Outcome) -> Outcome {
        let there = u32::from(outcome.stopped == Some(Stop::AlreadyThere));
        self.bitmap.clear(pages.start..(pages.start + outcome.pages + there).min(pages.end));
        outcome
    }
}

impl Install for BitmapInstall {
    fn fill(&self, layout: &Layout, first: u32, contents: &[u8]) -> Outcome {
        let outcome = self.inner.fill(layout, first, contents);
        let pages = (contents.len() as u64 / layout.place(first).page_size.bytes()) as u32;
        if self.fill_exposes() { self.exposed(first..first + pages, outcome) } else { outcome }
    }

    fn fill_window(&self, layout: &Layout, first: u32, contents: Window<'_>) -> Outcome {
        let pages = (contents.len() as u64 / layout.place(first).page_size.bytes()) as u32;
        let outcome = self.inner.fill_window(layout, first, contents);
        if self.fill_exposes() { self.exposed(first..first + pages, outcome) } else { outcome }
    }

    fn fill_exposes(&self) -> bool {
        self.inner.fill_exposes()
    }

    fn may_hold_anything(&self) -> bool {
        self.inner.may_hold_anything()
    }

    /// A page that is there is not exposed by this: what is in it has yet to be seen to.
    fn zero(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        let outcome = self.inner.zero(layout, pages.clone());
        self.bitmap.clear(pages.start..pages.start + outcome.pages);
        outcome
    }

    fn blank(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.inner.blank(layout, pages)
    }

    fn expose(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        let outcome = self.inner.expose(layout, pages.clone());
        self.exposed(pages, outcome)
    }

    fn unprotect(&self, layout: &Layout, page: u32) -> Outcome {
        self.inner.unprotect(layout, page)
    }

    /// Its bit stays set: it traps for as long as the VM lives.
    fn poison(&self, layout: &Layout, pages: Range<u32>) -> Outcome {
        self.inner.poison(layout, pages)
    }

    fn detach(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno> {
        self.inner.detach(layout, pages)
    }

    fn has_memory(&self) -> bool {
        self.inner.has_memory()
    }

    fn knows_memory(&self) -> bool {
        self.inner.knows_memory()
    }

    fn is_changing(&self) -> bool {
        self.inner.is_changing()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::{FillInstall, InstallView};
    use crate::memory::{PageSize, Region};

    const PAGE: usize = 4096;

    /// Regions of 3, 64 and 130 pages.
    fn layout() -> Layout {
        let (mut offset, mut regions) = (0, Vec::new());
        for pages in [3, 64, 130_u64] {
            let size = pages * PAGE as u64;
            regions.push(Region {
                gpa: None,
                hva: 1 << 30 | offset,
                size,
                offset,
                page_size: PageSize::Small,
            });
            offset += size;
        }
        Layout::new(regions).unwrap()
    }

    fn set(bitmap: &PageBitmap) -> Vec<u32> {
        (0..197).filter(|page| bitmap.is_set(*page)).collect()
    }

    #[test]
    fn each_region_has_words_of_its_own() {
        let layout = layout();
        let file = PageBitmap::create(&layout).unwrap();
        let bitmap = PageBitmap::map(&file, &layout).unwrap();
        assert_eq!(PageBitmap::bytes(&layout), (1 + 1 + 3) * 8);
        assert_eq!([0, 1, 2].map(|region| bitmap.offset(region)), [0, 8, 16]);
        bitmap.set(1..3);
        bitmap.set(3..67);
        bitmap.set(130..197);
        let words: Vec<u64> = (0..5).map(|word| bitmap.words.load(word * 8)).collect();
        assert_eq!(words, [0b110, u64::MAX, 1 << 63, u64::MAX, 0b11]);
        bitmap.clear(4..66);
        bitmap.clear(131..197);
        assert_eq!(set(&bitmap), [1, 2, 3, 66, 130]);
    }

    #[test]
    fn a_bitmap_that_is_too_small_or_can_be_cut_is_refused() {
        let layout = layout();
        let refused = |file: &OwnedFd| PageBitmap::map(file, &layout).unwrap_err().to_string();
        let small = memfd::create_fixed("t", 32).unwrap();
        assert_eq!(refused(&small), "it has 32 bytes and must have 40");
        assert!(refused(&memfd::create("t", 40).unwrap()).contains("F_SEAL_GROW"));
        assert!(refused(&std::fs::File::open("/dev/null").unwrap().into()).contains("no memory file"));
    }

    #[test]
    fn what_is_exposed_has_no_bit_and_what_the_guest_may_have_written_is_not_taken_for_zero() {
        let layout = layout();
        let memory = memfd::create("t", layout.end()).unwrap();
        let file = PageBitmap::create(&layout).unwrap();
        let bits = PageBitmap::map(&file, &layout).unwrap();
        bits.set(67..197);
        let inner = FillInstall::new(InstallView::map(&memory, &layout).unwrap());
        let install = BitmapInstall::new(Box::new(inner), PageBitmap::map(&file, &layout).unwrap());
        let done = |pages| Outcome { pages, stopped: None };
        // Filled, not exposed: it traps still.
        assert_eq!(install.fill(&layout, 68, &[7; 2 * PAGE]), done(2));
        assert!(bits.is_set(68) && bits.is_set(69));
        assert_eq!(install.expose(&layout, 68..70), done(2));
        assert!(bits.is_set(67) && !bits.is_set(68) && !bits.is_set(69) && bits.is_set(70));
        // Holes are zero without any work; what the file holds stays as it is.
        assert_eq!(install.zero(&layout, 67..70), Outcome { pages: 1, stopped: Some(Stop::AlreadyThere) });
        assert_eq!(install.zero(&layout, 70..197), done(127));
        assert_eq!(set(&bits), [0; 0]);
        let mut word = [0; 8];
        rustix::io::pread(&memory, &mut word, 69 * PAGE as u64).unwrap();
        assert_eq!(word, [7; 8]);
        assert_eq!(install.poison(&layout, 3..5), done(2));
        assert!(!install.fill_exposes() && !install.knows_memory());
    }
}
