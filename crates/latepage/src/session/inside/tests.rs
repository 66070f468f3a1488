//! Resolvers over a real userfaultfd, with threads for vCPUs: they call `exit` where a vCPU's access would come back to them, and
//! then look at the guest view as it would.

mod bits;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex};

use rustix::event::{EventfdFlags, PollFd, PollFlags};

use super::*;
use crate::install::PageBitmap;
use crate::memory::{PageSize, PageState, Region};
use crate::source::{Answer, SourceError};
use crate::sys::mapping::Mapping;
use crate::sys::memfd;
use crate::sys::uffd::MessageBuffer;

const PAGES: u32 = 256;
const BYTES: usize = PAGES as usize * 4096;
const GPA: u64 = 1 << 32;

/// Every word of page p is p + 1; each fourth page is a hole. It answers late, and only while its gate is open.
struct Numbers {
    open: Mutex<bool>,
    changed: Condvar,
    asked: AtomicU64,
    fails: bool,
}

impl Numbers {
    fn new(open: bool) -> Arc<Self> {
        Arc::new(Self {
            open: Mutex::new(open),
            changed: Condvar::new(),
            asked: AtomicU64::new(0),
            fails: false,
        })
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    /// Waits until so many asked it to wait.
    fn until_asked(&self, times: u64) {
        let mut open = self.open.lock().unwrap();
        while self.asked.load(Ordering::Acquire) < times {
            open = self.changed.wait(open).unwrap();
        }
    }
}

fn word(page: u32) -> u64 {
    if page % 4 == 3 { 0 } else { u64::from(page) + 1 }
}

impl Source for Numbers {
    fn describe(&self) -> String {
        "numbers".into()
    }

    fn size(&self) -> u64 {
        BYTES as u64
    }

    fn ask<'a>(
        &'a self,
        offset: u64,
        _: usize,
        unit: usize,
        _: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        Ok(if offset / 4096 % 4 == 3 { Answer::Zero(unit as u64) } else { Answer::Later })
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        _: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        let mut open = self.open.lock().unwrap();
        self.asked.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
        while !*open {
            open = self.changed.wait(open).unwrap();
        }
        drop(open);
        if self.fails {
            return Err(SourceError::Panicked { message: "a test".into() });
        }
        for (at, bytes) in scratch[..length].chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&(offset / 4096 + 1 + at as u64 / 512).to_ne_bytes());
        }
        Ok(Answer::Bytes(&scratch[..length]))
    }
}

struct Inside {
    resolver: Arc<Resolver>,
    bitmap: Arc<PageBitmap>,
    guest: Arc<Mapping>,
    _memory: OwnedFd,
}

/// `None` where this process may make no userfaultfd.
fn inside(source: Arc<Numbers>, window: u64) -> Option<Inside> {
    inside_of(memfd::create("guest", BYTES as u64).unwrap(), source, window)
}

fn inside_of(memory: OwnedFd, source: Arc<Numbers>, window: u64) -> Option<Inside> {
    let made = inside_by(memory, source, window, |bitmap| bitmap)?;
    made.resolver.arm().unwrap();
    Some(made)
}

/// The same with a trap that is made of the bitmap, or is another one; it is not armed.
fn inside_by(
    memory: OwnedFd,
    source: Arc<Numbers>,
    window: u64,
    trap: impl FnOnce(Arc<PageBitmap>) -> Arc<dyn Trap>,
) -> Option<Inside> {
    let guest = Arc::new(Mapping::shared(memory.as_fd(), 0, BYTES).unwrap());
    let layout = Layout::new(vec![Region {
        gpa: Some(GPA),
        hva: guest.address(),
        size: BYTES as u64,
        offset: 0,
        page_size: PageSize::Small,
    }])
    .unwrap();
    let bitmap = Arc::new(PageBitmap::map(PageBitmap::create(&layout).unwrap(), &layout).unwrap());
    let trap = trap(Arc::clone(&bitmap));
    match Resolver::new(layout, &memory, source, Some(trap), 12, FaultWindow::bytes(window).unwrap()) {
        Ok(resolver) => Some(Inside { resolver, bitmap, guest, _memory: memory }),
        Err(ResolverError::Userfaultfd(error)) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

impl Inside {
    fn armed(&self) -> u32 {
        (0..PAGES).filter(|page| self.bitmap.is_set(*page)).count() as u32
    }

    /// What a vCPU does: look at the page's trap, exit if it is armed, read.
    fn read(&self, seat: &mut Seat, page: u32) -> u64 {
        while self.bitmap.is_set(page) {
            seat.exit(GPA + u64::from(page) * 4096 + 8).unwrap();
        }
        self.guest.load(page as usize * 4096 + 4088)
    }

    /// Runs `work` while a thread serves the userfaultfd. Returns what that thread was told.
    fn served(&self, work: impl FnOnce()) -> Vec<String> {
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let mut seat = self.resolver.seat(11).unwrap();
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let mut told = Vec::new();
                seat.serve(stop.as_fd(), |what| told.push(format!("{what:?}"))).unwrap();
                told
            });
            work();
            rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
            server.join().unwrap()
        })
    }

    fn discard(&self, pages: Range<u32>) {
        let (start, length) = (pages.start as usize * 4096, pages.len() * 4096);
        self.resolver.discard(pages, || self.guest.remove(start, length)).unwrap();
    }
}

#[test]
fn an_exit_brings_its_page_and_nothing_else() {
    let Some(vm) = inside(Numbers::new(true), 4096) else { return };
    let mut seat = vm.resolver.seat(0).unwrap();
    assert!(vm.resolver.seat(0).is_none() && vm.resolver.seat(12).is_none());
    for page in [7, 8, 9] {
        assert_eq!(vm.read(&mut seat, page), word(page));
    }
    assert_eq!(vm.armed(), PAGES - 3);
    let stats = vm.resolver.stats();
    assert_eq!(stats, ResolverStats { exits: 3, filled: 2, zero: 1, ..ResolverStats::default() });
    assert!(seat.exit(GPA - 1).unwrap_err().to_string().contains("no region"));
    drop(seat);
    assert!(vm.resolver.seat(0).is_some());
}

#[test]
fn a_window_brings_absent_pages_up_to_its_end() {
    let Some(vm) = inside(Numbers::new(true), 16 << 10) else { return };
    let mut seat = vm.resolver.seat(0).unwrap();
    // The source answers for as much as it was asked, and holes are its own affair here.
    assert_eq!(vm.read(&mut seat, 9), 10);
    assert_eq!((vm.armed(), vm.resolver.stats().beside), (PAGES - 3, 2));
    assert_eq!(vm.read(&mut seat, 10), 11);
    assert_eq!(vm.resolver.stats().exits, 1);
    assert!(FaultWindow::bytes(1 << 20).is_err() && FaultWindow::bytes(100).is_err());
}

#[test]
fn threads_that_exit_and_threads_that_fault_bring_each_page_once() {
    let Some(vm) = inside(Numbers::new(true), 4096) else { return };
    let told = vm.served(|| {
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let vm = &vm;
                scope.spawn(move || {
                    let mut seat = vm.resolver.seat(thread).unwrap();
                    for step in 0..PAGES {
                        let page = (step * 37 + thread as u32 * 5) % PAGES;
                        assert_eq!(vm.read(&mut seat, page), word(page), "page {page}");
                    }
                });
            }
            for thread in 0..2 {
                let vm = &vm;
                scope.spawn(move || {
                    for step in 0..PAGES {
                        let page = (step * 41 + thread * 11) % PAGES;
                        assert_eq!(vm.guest.load(page as usize * 4096), word(page), "page {page}");
                    }
                });
            }
        });
    });
    assert!(told.is_empty(), "{told:?}");
    let stats = vm.resolver.stats();
    assert_eq!((stats.filled, stats.zero), (u64::from(PAGES) * 3 / 4, u64::from(PAGES) / 4));
    assert_eq!(vm.armed(), 0);
    assert_eq!(vm.resolver.pages().lacking(), 0);
}

#[test]
fn whoever_waits_for_a_page_goes_on_when_it_comes() {
    let source = Numbers::new(false);
    let Some(vm) = inside(Arc::clone(&source), 4096) else { return };
    vm.served(|| {
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let vm = &vm;
                scope.spawn(move || assert_eq!(vm.read(&mut vm.resolver.seat(thread).unwrap(), 5), 6));
            }
            let guest = &vm.guest;
            scope.spawn(move || assert_eq!(guest.load(5 * 4096), 6));
            source.until_asked(1);
            source.open();
        });
    });
    assert_eq!((vm.resolver.stats().filled, source.asked.load(Ordering::Acquire)), (1, 1));
}

#[test]
fn a_discarded_page_exits_again_and_is_zero() {
    let Some(vm) = inside(Numbers::new(true), 4096) else { return };
    let mut seat = vm.resolver.seat(0).unwrap();
    assert_eq!(vm.read(&mut seat, 5), 6);
    vm.discard(4..8);
    assert_eq!(vm.armed(), PAGES);
    for page in [5, 4] {
        assert_eq!(vm.read(&mut seat, page), 0);
    }
    vm.guest.store(5 * 4096 + 4088, 77);
    // Out of the guest view, and still in the file: it was not discarded by us, and is what it was.
    vm.guest.dont_need(5 * 4096, 4096).unwrap();
    vm.served(|| assert_eq!(vm.guest.load(5 * 4096 + 4088), 77));
}

/// A trap that can no longer be armed, and was never needed.
struct Stuck;

impl Trap for Stuck {
    fn arm(&self, _: &Layout, _: Range<u32>) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn disarm(&self, _: &Layout, _: Range<u32>) -> Result<(), Errno> {
        Ok(())
    }
}

#[test]
fn a_discard_whose_trap_cannot_be_armed_forgets_nobody_and_punches_nothing() {
    let memory = memfd::create("guest", BYTES as u64).unwrap();
    let Some(vm) = inside_by(memory, Numbers::new(true), 4096, |_| Arc::new(Stuck)) else { return };
    let mut seat = vm.resolver.seat(0).unwrap();
    seat.exit(GPA + 4 * 4096).unwrap();
    let uffd = vm.resolver.messages.as_ref().unwrap();
    let mut messages = MessageBuffer::new(4);
    let mut read_one = || {
        let bound = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
        let mut polled = [PollFd::new(&**uffd, PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut polled, Some(&bound)), Ok(1), "nobody looks again");
        assert_eq!(uffd.read(&mut messages), Ok(1));
        messages.drain().for_each(drop);
    };
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| vm.guest.load(5 * 4096));
        // It has been read, and nobody answers it.
        read_one();
        let refused = vm.resolver.discard(4..6, || panic!("a hole under a trap that is off"));
        assert_eq!(refused, Err(Errno::INVAL));
        read_one();
        seat.exit(GPA + 5 * 4096).unwrap();
        assert_eq!(waits.join().unwrap(), 0, "it counts as removed");
    });
    // One that was there is what it was.
    seat.exit(GPA + 4 * 4096).unwrap();
    assert_eq!(vm.guest.load(4 * 4096), 5);
}

#[test]
fn a_page_that_is_discarded_while_it_comes_is_zero_afterwards() {
    let source = Numbers::new(false);
    let Some(vm) = inside(Arc::clone(&source), 4096) else { return };
    std::thread::scope(|scope| {
        let vm = &vm;
        let exit = scope.spawn(move || vm.resolver.seat(0).unwrap().exit(GPA + 5 * 4096));
        source.until_asked(1);
        let discard = scope.spawn(|| vm.discard(5..6));
        while vm.resolver.pages().state(5) == PageState::InFlight {
            std::thread::yield_now();
        }
        source.open();
        discard.join().unwrap();
        exit.join().unwrap().unwrap();
    });
    vm.served(|| assert_eq!(vm.guest.load(5 * 4096), 0));
}

#[test]
fn a_page_that_cannot_be_had_is_an_error_for_all_who_want_it() {
    let source = Arc::new(Numbers { fails: true, ..Arc::into_inner(Numbers::new(false)).unwrap() });
    let Some(vm) = inside(Arc::clone(&source), 4096) else { return };
    let told = vm.served(|| {
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let vm = &vm;
                scope.spawn(move || {
                    let refused = vm.resolver.seat(thread).unwrap().exit(GPA + 5 * 4096).unwrap_err();
                    assert_eq!(refused.at, Address::Guest(GPA + 5 * 4096));
                });
            }
            source.until_asked(1);
            source.open();
        });
        // The kernel reads it for us, and meets the poison: an error where a load would be a SIGBUS.
        if crate::sys::uffd::Userfaultfd::offered().unwrap().contains(Features::POISON) {
            let read = vm.guest.window(5 * 4096, 4096).copy_to(&mut [0; 4096]);
            assert_eq!(read, Err(Errno::FAULT));
        }
    });
    assert!(told.is_empty(), "{told:?}");
    assert!(vm.bitmap.is_set(5));
}

#[test]
fn what_the_memory_file_had_before_is_written_over_and_nobody_sees_it() {
    let memory = memfd::create("guest", BYTES as u64).unwrap();
    let stale = vec![0xEE; BYTES];
    rustix::io::pwrite(&memory, &stale, 0).unwrap();
    let Some(vm) = inside_of(memory, Numbers::new(true), 4096) else { return };
    let mut seat = vm.resolver.seat(0).unwrap();
    // 7 and 3 are holes of the source.
    for page in [9, 8, 7, 3, 12] {
        assert_eq!(vm.read(&mut seat, page), word(page), "page {page}");
    }
    vm.served(|| (0..PAGES).for_each(|page| assert_eq!(vm.guest.load(page as usize * 4096), word(page))));
    let stats = vm.resolver.stats();
    assert_eq!((stats.filled, stats.zero), (u64::from(PAGES) * 3 / 4, u64::from(PAGES) / 4));
}
