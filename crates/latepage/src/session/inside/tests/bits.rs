//! Many threads at once, without any userfaultfd: pages trap by a bit, which each thread looks at before it looks at its page.

use std::sync::Barrier;

use super::*;
use crate::install::{FillInstall, InstallView};
use crate::source::SourceError;

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
                let errno = Errno::IO;
                return Err(SourceError::Read { path: "counting".into(), offset, errno });
            }
            self.0[page as usize].fetch_add(1, Ordering::Relaxed);
            bytes.fill(0);
            bytes[..8].copy_from_slice(&Self::word(page).to_le_bytes());
        }
        Ok(Answer::Bytes(&scratch[..length]))
    }
}

/// A guest whose pages trap by a bit alone.
struct Guest {
    resolver: Arc<Resolver>,
    bits: Arc<PageBitmap>,
    view: Mapping,
    source: Arc<Counting>,
}

impl Guest {
    fn new(pages: u32, broken: Option<u32>, seats: usize, window: u64) -> Self {
        let size = u64::from(pages) * PAGE as u64;
        let memory = memfd::create("t", size).unwrap();
        let view = Mapping::shared(memory.as_fd(), 0, size as usize).unwrap();
        let region = Region { gpa: None, hva: view.address(), size, offset: 0, page_size: PageSize::Small };
        let layout = Layout::new(vec![region]).unwrap();
        let bits = PageBitmap::map(PageBitmap::create(&layout).unwrap(), &layout).unwrap();
        let bits = Arc::new(bits);
        let fills = || -> Box<dyn Install> {
            Box::new(FillInstall::new(InstallView::map(&memory, &layout).unwrap()))
        };
        let trap: Arc<dyn Trap> = Arc::clone(&bits) as _;
        let ways = Ways { install: fills(), over: Some(fills()), messages: None, trap: Some(trap) };
        let source = Arc::new(Counting((0..pages).map(|_| AtomicU64::new(0)).collect(), broken));
        let window = FaultWindow::bytes(window).unwrap();
        let resolver = Resolver::with(layout.clone(), Arc::clone(&source) as _, ways, seats, window);
        resolver.arm().unwrap();
        Self { resolver, bits, view, source }
    }

    /// What the page's first word is; an exit where it traps.
    fn touch(&self, page: u32, seat: &mut Seat) -> Result<u64, Unresolved> {
        while self.bits.is_set(page) {
            seat.touch(self.view.address() + u64::from(page) * PAGE as u64 + 9)?;
        }
        Ok(self.view.load(page as usize * PAGE))
    }
}

#[test]
fn many_threads_resolve_at_once_and_each_page_is_brought_once() {
    const PAGES: u32 = 4000;
    let guest = Guest::new(PAGES, None, 32, 16 << 10);
    let together = Barrier::new(32);
    std::thread::scope(|scope| {
        for number in 0..32 {
            let (guest, together) = (&guest, &together);
            scope.spawn(move || {
                let mut seat = guest.resolver.seat(number).unwrap();
                together.wait();
                for turn in 0..PAGES {
                    let page = (turn * 7 + number as u32 % 4) % PAGES;
                    assert_eq!(guest.touch(page, &mut seat), Ok(Counting::word(page)), "page {page}");
                }
            });
        }
    });
    assert!(guest.source.0.iter().all(|asked| asked.load(Ordering::Relaxed) == 1));
    let stats = guest.resolver.stats();
    assert_eq!(
        (stats.filled, stats.zero),
        (u64::from(PAGES - PAGES.div_ceil(3)), u64::from(PAGES.div_ceil(3)))
    );
    // Each exit brought its page, waited for it, or found it there.
    assert_eq!(stats.exits - stats.joined - stats.present, stats.filled + stats.zero - stats.beside);
    assert_eq!(guest.resolver.pages().lacking(), 0);
}

#[test]
fn four_thousand_seats_each_bring_a_page() {
    const SEATS: u32 = 4096;
    let guest = Guest::new(SEATS, None, SEATS as usize, 4096);
    let mut seats: Vec<Seat> = (0..SEATS as usize).map(|seat| guest.resolver.seat(seat).unwrap()).collect();
    for (page, seat) in seats.iter_mut().enumerate() {
        assert_eq!(guest.touch(page as u32, seat), Ok(Counting::word(page as u32)));
    }
    guest.resolver.discard(1..2, || guest.view.remove(PAGE, PAGE)).unwrap();
    assert_eq!(guest.touch(1, &mut seats[4095]), Ok(0));
    assert_eq!(guest.resolver.stats().exits, u64::from(SEATS) + 1);
}

#[test]
fn what_is_discarded_while_others_fault_is_never_the_snapshot_again() {
    const PAGES: u32 = 256;
    let guest = Guest::new(PAGES, None, 9, 16 << 10);
    std::thread::scope(|scope| {
        for number in 0..8 {
            let guest = &guest;
            scope.spawn(move || {
                let mut seat = guest.resolver.seat(number).unwrap();
                for page in (0..PAGES).map(|turn| (turn * 5 + number as u32) % PAGES) {
                    let word = guest.touch(page, &mut seat).unwrap();
                    assert!(word == 0 || word == Counting::word(page), "page {page}: {word:#x}");
                }
            });
        }
        for page in (0..PAGES).step_by(2) {
            let remove = || guest.view.remove(page as usize * PAGE, PAGE);
            guest.resolver.discard(page..page + 1, remove).unwrap();
        }
    });
    let mut seat = guest.resolver.seat(8).unwrap();
    for page in 0..PAGES {
        let expected = if page % 2 == 0 { 0 } else { Counting::word(page) };
        assert_eq!(guest.touch(page, &mut seat), Ok(expected), "page {page}");
    }
}

#[test]
fn a_page_that_cannot_be_had_fails_whoever_asks_and_no_other() {
    let guest = Guest::new(8, Some(5), 2, 4096);
    let [mut seat, mut other] = [0, 1].map(|number| guest.resolver.seat(number).unwrap());
    assert_eq!(guest.touch(4, &mut seat), Ok(Counting::word(4)));
    let told = guest.touch(5, &mut seat).unwrap_err().to_string();
    let host =
        format!("the memory at host address {:#x} could not be had: ", guest.view.address() + 5 * 4096);
    assert!(told.starts_with(&host) && told.contains("counting"), "{told}");
    assert_eq!(guest.touch(5, &mut other).unwrap_err().reason, Reason::Before);
    assert_eq!(guest.touch(7, &mut seat), Ok(Counting::word(7)));
    assert!(guest.bits.is_set(5));
    let stats = guest.resolver.stats();
    assert_eq!((stats.exits, stats.filled, stats.zero), (4, 2, 0));
    assert_eq!(
        seat.touch(8).unwrap_err().to_string(),
        "the memory at host address 0x8 could not be had: no region has it"
    );
}
