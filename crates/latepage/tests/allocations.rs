//! No worker allocates while it serves faults, and no thread that resolves its own: proven by an allocator that counts.
#![allow(unsafe_code, reason = "an allocator is unsafe code by its trait; this one only counts")]

mod vmm;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use latepage::attachment::Backing;
use latepage::memory::{self, PageSize, Region};
use latepage::session::{FaultAround, FaultWindow, Policy, Reason, Resolver};
use latepage::source::FileSource;
use latepage::sys::mapping::Mapping;
use latepage::sys::memfd;
use vmm::PAGE;
use vmm::guest::Guest;
use vmm::serving::{Directory, Serving, policy};
use vmm::snapshot::{Snapshot, word};
use vmm::trap::trapping;

use std::sync::Arc;

static OF_WORKERS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Set while this thread is in its handler, and how often it has allocated there. Without a destructor.
    static IN_HANDLER: Cell<bool> = const { Cell::new(false) };
    static OF_HANDLER: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

/// Whether the calling thread is a worker, by its name, which the kernel tells without any memory of ours.
fn is_worker() -> bool {
    let mut name = [0u8; 16];
    // SAFETY: the kernel writes at most 16 bytes there.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    name.starts_with(b"latepage-w")
}

// SAFETY: all of it is the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_worker() {
            OF_WORKERS.fetch_add(1, Ordering::Relaxed);
        }
        if IN_HANDLER.get() {
            OF_HANDLER.set(OF_HANDLER.get() + 1);
        }
        // SAFETY: what the caller promised is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: what the caller promised is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One fault after the other, then many at once and discards among them: the first few may fill what is filled once.
#[test]
fn a_worker_allocates_nothing_for_a_fault() {
    need_userfaultfd!();
    const PAGES: usize = 4096;
    for backing in [Backing::Anonymous, Backing::Shared, Backing::Private] {
        for fault_around in [FaultAround::NONE, FaultAround::Auto, FaultAround::Window(64 << 10)] {
            let guest = Guest::new(backing, PAGES);
            let source = Arc::new(Snapshot::new(guest.layout.end()));
            let policy = Policy { fault_around, trace: 256, ..policy() };
            let mut serving = Serving::new(source, policy);
            let _socket = guest.connect(&serving.socket, "vm");
            let session = serving.session("vm");
            let touch = |at: usize| {
                let page = at * 1663 % PAGES;
                assert_eq!(guest.touch(page).join(), word((page * 4096) as u64, 0));
            };
            (0..100).for_each(touch);
            guest.discard(5 * 1663 % PAGES, 1).join();
            let (before, faults) =
                (OF_WORKERS.load(Ordering::Relaxed), session.stats().counters.faults.get());
            (100..1600).for_each(touch);
            let some: Vec<_> = (1600..1700).map(|at| guest.touch(at * 1663 % PAGES)).collect();
            for touched in some {
                touched.join();
            }
            guest.discard(8, 64).join();
            guest.touch(8).join();
            let came = session.stats().counters.faults.get() - faults;
            assert!(came > 20, "{came} faults");
            assert_eq!(
                OF_WORKERS.load(Ordering::Relaxed),
                before,
                "{backing}, {fault_around:?}: {came} faults"
            );
        }
    }
}

/// Contents, a hole and zeros that are data, from a memory file; alone and with a window; anonymous and shared; discarded pages too.
#[test]
fn a_thread_that_resolves_its_own_faults_allocates_nothing_in_its_handler() {
    need_userfaultfd!();
    const PAGES: usize = 1024;
    let directory = Directory::new();
    let path = directory.file("memory");
    let mut file = std::fs::File::create(&path).unwrap();
    for page in 0..PAGES {
        match page % 8 {
            5 => drop(file.seek(SeekFrom::Current(PAGE as i64)).unwrap()),
            6 => file.write_all(&[0; PAGE]).unwrap(),
            _ => file.write_all(&[page as u8 | 1; PAGE]).unwrap(),
        }
    }
    drop(file);
    // The counter counts.
    IN_HANDLER.set(true);
    drop(std::hint::black_box(Box::new(PAGES)));
    IN_HANDLER.set(false);
    assert_eq!(OF_HANDLER.replace(0), 1);
    let contents = |page: usize| {
        if matches!(page % 8, 5 | 6) { 0 } else { u64::from_ne_bytes([page as u8 | 1; 8]) }
    };
    for (is_shared, window) in [(true, 4096), (true, 64 << 10), (false, 4096), (false, 64 << 10)] {
        let length = PAGES * PAGE;
        let memory = memfd::create("guest", length as u64).unwrap();
        let view = match is_shared {
            true => Mapping::shared(memory.as_fd(), 0, length).unwrap(),
            false => Mapping::anonymous(length).unwrap(),
        };
        let (hva, size) = (view.address(), length as u64);
        let region = Region { gpa: None, hva, size, offset: 0, page_size: PageSize::Small };
        let layout = memory::Layout::new(vec![region]).unwrap();
        let source = Arc::new(FileSource::open(&path).unwrap());
        let window = FaultWindow::bytes(window).unwrap();
        let resolver = Resolver::by_signal(layout, source, 1, window).unwrap();
        let seat = RefCell::new(resolver.seat(0).unwrap());
        let resolve = |address| {
            IN_HANDLER.set(true);
            let resolved = seat.borrow_mut().touch(address);
            IN_HANDLER.set(false);
            resolved.is_ok()
        };
        let read = |page: usize, expected| {
            trapping(&resolve, || assert_eq!(view.load(page * PAGE), expected, "page {page}"));
        };
        (0..PAGES).map(|turn| turn * 7 % PAGES).for_each(|page| read(page, contents(page)));
        let punch = || if is_shared { view.remove(0, 4 * PAGE) } else { view.dont_need(0, 4 * PAGE) };
        resolver.discard(0..4, punch).unwrap();
        (0..4).for_each(|page| read(page, 0));
        // A refusal is no allocation either.
        IN_HANDLER.set(true);
        let refused = seat.borrow_mut().touch(hva + size).map_err(|unresolved| unresolved.reason);
        IN_HANDLER.set(false);
        assert_eq!(refused, Err(Reason::NoRegion));
        let stats = resolver.stats();
        assert_eq!((stats.filled + stats.zero, stats.zero >= 2 * PAGES as u64 / 8), (PAGES as u64 + 4, true));
        assert_eq!(OF_HANDLER.get(), 0, "shared: {is_shared}, {window:?}");
    }
}
