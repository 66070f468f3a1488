//! Exits in one process: an access traps where its page is not there, which its thread looks up, and resolves.

use std::os::fd::AsFd;
use std::sync::Barrier;

use super::*;
use crate::install::{BitmapInstall, FillInstall, InstallView, PageBitmap};
use crate::memory::{PageSize, Region};
use crate::source::SourceError;
use crate::sys::mapping::Mapping;
use crate::sys::memfd;

const PAGE: usize = 4096;

/// Every third page is zero, one is broken; how often each was asked for.
struct Counting(Vec<AtomicU64>, Option<u32>);

impl Counting {
    fn word(page: u32) -> u64 {
        if page.is_multiple_of(3) { 0 } else { u64::from(page) << 32 | 1 }
    }
}

impl Source for Counting {
    fn describe(&self) -> String {
        "counting".to_owned()
    }

    fn size(&self) -> u64 {
        (self.0.len() * PAGE) as u64
    }

    fn ask<'a>(&'a self, _: u64, _: usize, _: usize, _: &'a mut [u8]) -> Result<Answer<'a>, SourceError> {
        Ok(Answer::Later)
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        _: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        for (at, bytes) in scratch[..length].chunks_exact_mut(PAGE).enumerate() {
            let page = (offset as usize / PAGE + at) as u32;
            if self.1 == Some(page) {
                let errno = rustix::io::Errno::IO;
                return Err(SourceError::Read { path: "counting".into(), offset, errno });
            }
            self.0[page as usize].fetch_add(1, Ordering::Relaxed);
            bytes.fill(0);
            bytes[..8].copy_from_slice(&Self::word(page).to_le_bytes());
        }
        Ok(Answer::Bytes(&scratch[..length]))
    }
}

/// A guest whose pages trap by a bit.
struct Guest {
    exits: Exits,
    bits: PageBitmap,
    view: Mapping,
    source: Arc<Counting>,
}

impl Guest {
    fn new(pages: u32, broken: Option<u32>) -> Arc<Self> {
        let size = u64::from(pages) * PAGE as u64;
        let memory = memfd::create("t", size).unwrap();
        let view = Mapping::shared(memory.as_fd(), 0, size as usize).unwrap();
        let hva = view.address();
        let layout =
            Layout::new(vec![Region { gpa: None, hva, size, offset: 0, page_size: PageSize::Small }])
                .unwrap();
        let file = PageBitmap::create(&layout).unwrap();
        let bits = PageBitmap::map(&file, &layout).unwrap();
        bits.set(0..pages);
        let fill = FillInstall::new(InstallView::map(&memory, &layout).unwrap());
        let install = BitmapInstall::new(Box::new(fill), PageBitmap::map(&file, &layout).unwrap());
        let source = Arc::new(Counting((0..pages).map(|_| AtomicU64::new(0)).collect(), broken));
        let exits = Exits::new(layout, Arc::clone(&source) as _, Box::new(install), 16 << 10);
        Arc::new(Self { exits, bits, view, source })
    }

    /// What the page's first word is; an exit where it traps.
    fn touch(&self, page: u32, number: usize, buffer: &mut [u8]) -> Result<u64, Unresolved> {
        while self.bits.is_set(page) {
            assert!(self.exits.resolve(page, number, buffer)?.contains(&page));
        }
        Ok(self.view.load(page as usize * PAGE))
    }
}

#[test]
fn many_threads_resolve_at_once_and_each_page_is_brought_once() {
    const PAGES: u32 = 4000;
    let guest = Guest::new(PAGES, None);
    let together = Arc::new(Barrier::new(32));
    let threads: Vec<_> = (0..32)
        .map(|number| {
            let (guest, together) = (Arc::clone(&guest), Arc::clone(&together));
            std::thread::spawn(move || {
                let mut buffer = vec![0; 16 << 10];
                together.wait();
                for turn in 0..PAGES {
                    let page = (turn * 7 + number as u32 % 4) % PAGES;
                    assert_eq!(
                        guest.touch(page, number, &mut buffer),
                        Ok(Counting::word(page)),
                        "page {page}"
                    );
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(guest.source.0.iter().all(|asked| asked.load(Ordering::Relaxed) == 1));
    assert_eq!((guest.exits.brought(), guest.exits.pages().lacking()), (u64::from(PAGES), 0));
}

#[test]
fn what_is_discarded_while_others_fault_is_never_the_snapshot_again() {
    const PAGES: u32 = 256;
    let guest = Guest::new(PAGES, None);
    let threads: Vec<_> = (0..8)
        .map(|number| {
            let guest = Arc::clone(&guest);
            std::thread::spawn(move || {
                let mut buffer = vec![0; 16 << 10];
                for page in (0..PAGES).map(|turn| (turn * 5 + number as u32) % PAGES) {
                    let word = guest.touch(page, number, &mut buffer).unwrap();
                    assert!(word == 0 || word == Counting::word(page), "page {page}: {word:#x}");
                }
            })
        })
        .collect();
    for page in (0..PAGES).step_by(2) {
        guest.exits.removed(page..page + 1);
        guest.view.remove(page as usize * PAGE, PAGE).unwrap();
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let mut buffer = vec![0; 16 << 10];
    for page in 0..PAGES {
        let expected = if page % 2 == 0 { 0 } else { Counting::word(page) };
        assert_eq!(guest.touch(page, 0, &mut buffer), Ok(expected), "page {page}");
    }
}

#[test]
fn a_page_that_cannot_be_had_fails_whoever_asks_and_no_other() {
    let guest = Guest::new(8, Some(5));
    let mut buffer = vec![0; PAGE];
    assert_eq!(guest.touch(4, 0, &mut buffer), Ok(Counting::word(4)));
    let told = guest.touch(5, 0, &mut buffer).unwrap_err().to_string();
    assert!(told.starts_with("page 5 cannot be had: ") && told.contains("counting"), "{told}");
    assert!(matches!(guest.touch(5, 1, &mut buffer), Err(Unresolved::Failed { page: 5, .. })));
    assert_eq!(guest.touch(7, 0, &mut buffer), Ok(Counting::word(7)));
    assert!(guest.bits.is_set(5));
}
