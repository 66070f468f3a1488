//! No worker allocates while it serves faults: proven by an allocator that counts.
#![allow(unsafe_code, reason = "an allocator is unsafe code by its trait; this one only counts")]

mod vmm;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use latepage::attachment::Backing;
use latepage::session::{FaultAround, Policy};
use vmm::guest::Guest;
use vmm::serving::{Serving, policy};
use vmm::snapshot::{Snapshot, word};

use std::sync::Arc;

static OF_WORKERS: AtomicU64 = AtomicU64::new(0);

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
