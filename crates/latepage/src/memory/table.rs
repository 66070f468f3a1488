//! The page table of a VM in a memory file that the VMM keeps: it outlives the pager that writes it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::AtomicU8;

use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::Layout;
use crate::sys::mapping::{MapError, Mapping};
use crate::sys::memfd::{self, NotFixed};

/// The states of all pages of a VM, a byte each, in the order of their numbers, in a file that the VMM makes and hands to one pager
/// after another. Zero is [`Absent`](super::PageState::Absent): a new file needs no writing.
///
/// Only the pager writes it. Whatever a VMM writes there it does to itself: a byte that is no state is a page that
/// [`Failed`](super::PageState::Failed).
#[derive(Debug)]
pub struct PageTable {
    mapping: Mapping,
    /// By an open of our own, whose offset is nobody else's; `None` where there is no /proc to open it by.
    file: Option<OwnedFd>,
    pages: u32,
}

/// A page table cannot be used. Each text says why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum PageTableError {
    /// Its memory cannot be trusted to stay, or it is the table of another VM.
    #[error(transparent)]
    NotFixed(#[from] NotFixed),
    /// It cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
}

impl PageTable {
    /// Bytes of the file of these regions.
    pub fn bytes(layout: &Layout) -> u64 {
        layout.pages().into()
    }

    /// Makes the file of a table, sealed, with all pages absent.
    ///
    /// # Errors
    /// The errno of the call that failed.
    pub fn create(layout: &Layout) -> Result<OwnedFd, Errno> {
        memfd::create_fixed("latepage-pages", Self::bytes(layout))
    }

    /// Maps a table that may have come from a stranger.
    ///
    /// # Errors
    /// [`PageTableError`].
    pub fn map(file: impl AsFd, layout: &Layout) -> Result<Self, PageTableError> {
        let file = file.as_fd();
        let (length, needed) = (memfd::check_fixed(file)?, Self::bytes(layout));
        if length != needed {
            return Err(NotFixed::Length { length, needed }.into());
        }
        let mapping = Mapping::shared(file, 0, length as usize)?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let own = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok();
        Ok(Self { mapping, file: own, pages: layout.pages() })
    }

    /// A byte for each page.
    #[inline]
    pub(super) fn states(&self) -> &[AtomicU8] {
        self.mapping.bytes(self.pages as usize)
    }

    /// The byte of the eight pages from `page` on, where it is the same of all of them: most pages are as their neighbours. For a walk
    /// before anybody of this process takes a step.
    pub(super) fn eight(&self, page: u32) -> Option<u8> {
        if !page.is_multiple_of(8) || self.pages - page < 8 {
            return None;
        }
        let word = self.mapping.load(page as usize);
        let byte = word as u8;
        (word == u64::from_ne_bytes([byte; 8])).then_some(byte)
    }

    /// The first page from `page` on that somebody has ever written to, as far as the file tells, and one past the last that follows
    /// it; `None` where all of them are absent. Looking at the others would only give them memory.
    pub(super) fn written(&self, page: u32) -> Option<(u32, u32)> {
        if page >= self.pages {
            return None;
        }
        let Some(file) = &self.file else { return Some((page, self.pages)) };
        let from = match rustix::fs::seek(file, SeekFrom::Data(page.into())) {
            Ok(from) => from.min(self.pages.into()) as u32,
            Err(Errno::NXIO) => return None,
            Err(_) => page,
        };
        // Somebody may punch the file meanwhile: one page at least is always got over.
        let to = rustix::fs::seek(file, SeekFrom::Hole(from.into())).unwrap_or(self.pages.into());
        let to = to.min(self.pages.into()) as u32;
        Some((from, to.max(from + 1).min(self.pages)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{Claim, PageSize, PageState, Pages, Region, Step};

    fn layout(pages: u32) -> Layout {
        let size = u64::from(pages) * 4096;
        let region = Region { gpa: None, hva: 1 << 30, size, offset: 0, page_size: PageSize::Small };
        Layout::new(vec![region]).unwrap()
    }

    fn handed(file: &OwnedFd, pages: u32) -> Pages {
        Pages::handed(PageTable::map(file, &layout(pages)).unwrap())
    }

    /// A table that holds these bytes.
    fn holding(bytes: &[u8]) -> (OwnedFd, Pages) {
        let file = PageTable::create(&layout(bytes.len() as u32)).unwrap();
        rustix::io::pwrite(&file, bytes, 0).unwrap();
        let pages = handed(&file, bytes.len() as u32);
        (file, pages)
    }

    fn byte(file: &OwnedFd, page: u32) -> u8 {
        let mut byte = [0];
        rustix::io::pread(file, &mut byte, page.into()).unwrap();
        byte[0]
    }

    #[test]
    fn the_next_pager_finds_what_the_one_before_has_done() {
        let file = PageTable::create(&layout(8)).unwrap();
        let first = handed(&file, 8);
        assert_eq!((first.take_over(), first.is_handed()), (8, true));
        for page in 1..6 {
            assert_eq!(first.claim(page), Claim::Fill);
        }
        assert!(first.filled(2) && first.filled(3) && first.settle(3));
        first.remove(4);
        first.remove(5);
        assert_eq!(first.claim(5), Claim::Clear);
        first.fail(6);
        drop(first);
        let second = handed(&file, 8);
        // Pages 0, 1 and 7: what was in flight is owed again.
        assert_eq!((second.take_over(), second.lacking()), (3, 3));
        use PageState::*;
        let states: Vec<_> = (0..8).map(|page| second.state(page)).collect();
        assert_eq!(states, [Absent, Absent, Filled, Present, Removed, Removed, Failed, Absent]);
        assert_eq!(second.claim(2), Claim::Expose, "never filled again");
    }

    #[test]
    fn a_table_that_nobody_has_written_is_not_given_memory_by_looking() {
        const PAGES: u32 = 1 << 24;
        let file = PageTable::create(&layout(PAGES)).unwrap();
        let blocks = || rustix::fs::fstat(&file).unwrap().st_blocks;
        assert_eq!((handed(&file, PAGES).take_over(), blocks()), (PAGES.into(), 0));
        // Far inside, and at the end: the walk finds them.
        for page in [PAGES / 2 + 5, PAGES - 1] {
            rustix::io::pwrite(&file, &[PageState::InFlight as u8], page.into()).unwrap();
            rustix::io::pwrite(&file, &[PageState::Present as u8], (page - 1).into()).unwrap();
        }
        let before = blocks();
        assert_eq!((handed(&file, PAGES).take_over(), blocks()), (u64::from(PAGES) - 2, before));
        assert_eq!(byte(&file, PAGES - 1), PageState::Absent as u8);
    }

    #[test]
    fn a_table_that_is_too_short_or_can_be_cut_is_refused() {
        let refused = |file: OwnedFd| PageTable::map(file, &layout(8)).unwrap_err().to_string();
        assert_eq!(refused(memfd::create_fixed("t", 7).unwrap()), "it has 7 bytes and must have 8");
        assert!(refused(memfd::create("t", 8).unwrap()).contains("F_SEAL_GROW"));
        assert!(refused(std::fs::File::open("/dev/null").unwrap().into()).contains("no memory file"));
    }

    proptest! {
        #[test]
        fn every_page_is_taken_over_as_it_would_be_alone(
            runs in prop::collection::vec((prop::sample::select(&PageState::ALL[..]), 1..20_usize), 1..12),
        ) {
            let before: Vec<PageState> =
                runs.into_iter().flat_map(|(state, pages)| std::iter::repeat_n(state, pages)).collect();
            let (_file, pages) = holding(&before.iter().map(|state| *state as u8).collect::<Vec<_>>());
            let owed = pages.take_over();
            let expected: Vec<_> =
                before.iter().map(|state| Step::Abandon.from(*state).unwrap_or(*state)).collect();
            let now: Vec<_> = (0..pages.len()).map(|page| pages.state(page)).collect();
            prop_assert_eq!(&now, &expected);
            prop_assert_eq!(owed, pages.lacking());
        }

        #[test]
        fn a_byte_that_is_no_state_is_a_page_that_failed_and_stays_what_it_is(
            bytes in prop::collection::vec(any::<u8>(), 1..64),
            steps in prop::collection::vec((prop::sample::select(&Step::ALL[..]), any::<u32>()), 0..64),
        ) {
            let (file, pages) = holding(&bytes);
            let owed = pages.take_over();
            prop_assert!(owed <= bytes.len() as u64);
            for (step, page) in steps {
                let page = page % bytes.len() as u32;
                match step {
                    Step::Claim => { pages.claim(page); }
                    Step::ClaimAbsent => { pages.claim_absent(page); }
                    Step::Filled => { pages.filled(page); }
                    Step::Settle => { pages.settle(page); }
                    Step::Abandon => { pages.abandon(page); }
                    Step::Remove => { pages.remove(page); }
                    Step::Fail => { pages.fail(page); }
                }
            }
            prop_assert_eq!(pages.count().iter().sum::<u64>(), bytes.len() as u64);
            for (page, garbage) in (0..).zip(&bytes).filter(|(_, byte)| usize::from(**byte) >= PageState::ALL.len()) {
                prop_assert_eq!((pages.claim(page), byte(&file, page)), (Claim::Failed, *garbage));
            }
        }
    }

    #[test]
    fn a_vmm_that_scribbles_while_steps_are_taken_keeps_none_of_them_from_ending() {
        let (file, pages) = holding(&[0; 64]);
        let over = std::sync::atomic::AtomicBool::new(false);
        let mapping = Mapping::shared(file.as_fd(), 0, 64).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = 1_u64;
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let byte = &mapping.bytes(64)[(random >> 40) as usize % 64];
                    byte.store((random >> 50) as u8 % 9, std::sync::atomic::Ordering::Relaxed);
                }
            });
            for round in 0..20_000_u32 {
                let page = round % 64;
                pages.claim(page);
                pages.filled(page);
                pages.settle(page);
                pages.remove(page);
                assert!(pages.take_over() <= 64 && pages.absent_run(page, 64, 64).end <= 64);
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
