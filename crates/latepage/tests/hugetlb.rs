//! Memory in pages of 2 MiB, and a pool that has too few of them. Tests here share the machine's pool: each takes it in turn,
//! and gives it back as it found it.

mod vmm;

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use latepage::attachment::Backing;
use latepage::pager::What;
use latepage::sys::mapping::Mapping;
use latepage::sys::memfd::{self, NotSealed};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use vmm::guest::Guest;
use vmm::serving::{Serving, policy, populating};
use vmm::snapshot::{Snapshot, word};
use vmm::{HUGE, until};

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// The machine's pool of huge pages, for one test at a time.
struct Pool {
    before: u64,
    _turn: MutexGuard<'static, ()>,
    /// Another process's turn is kept by a lock on the file.
    _lock: std::fs::File,
}

impl Pool {
    /// Takes the pool with so many pages in it, or says why the test is skipped.
    fn of(pages: u64) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(lock) = std::fs::File::open(POOL) else {
            eprintln!("skipped: this kernel has no pool of huge pages ({POOL})");
            return None;
        };
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let before = std::fs::read_to_string(POOL).unwrap().trim().parse().unwrap();
        if before > 0 {
            eprintln!("skipped: the pool of huge pages is in use by others ({POOL} is not 0)");
            return None;
        }
        let pool = Self { before, _turn: turn, _lock: lock };
        match pool.set(pages) {
            true => Some(pool),
            false => {
                eprintln!("skipped: {pages} huge pages cannot be had ({POOL})");
                None
            }
        }
    }

    /// Makes it so many pages, and says whether it is.
    fn set(&self, pages: u64) -> bool {
        let _ = std::fs::write(POOL, pages.to_string());
        std::fs::read_to_string(POOL).is_ok_and(|found| found.trim() == pages.to_string())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = std::fs::write(POOL, self.before.to_string());
    }
}

#[test]
fn huge_pages_read_their_snapshot_and_zero_once_discarded() {
    need_userfaultfd!();
    let Some(_pool) = Pool::of(8) else { return };
    for population in [policy(), populating()] {
        let guest = Guest::new(Backing::Hugetlb, 6);
        let mut serving = Serving::new(Arc::new(Snapshot::new(guest.layout.end())), population);
        let _socket = guest.connect(&serving.socket, "vm");
        assert_eq!(guest.verify(5, |offset| word(offset, 0)).join(), [0; 0]);
        guest.discard(1, 2).join();
        guest.write(2, 8).join();
        assert_eq!(guest.read(1).join(), vec![0; HUGE]);
        assert_eq!(guest.touch(2).join(), 8);
        assert_eq!(guest.touch(3).join(), word(3 * HUGE as u64, 0));
        until("all of it", || serving.session("vm").owed() == 0);
    }
}

#[test]
fn a_fault_on_an_empty_pool_is_told_and_served_once_there_are_pages() {
    need_userfaultfd!();
    let Some(pool) = Pool::of(1) else { return };
    let guest = Guest::new(Backing::Hugetlb, 3);
    let mut serving = Serving::new(Arc::new(Snapshot::new(guest.layout.end())), policy());
    let _socket = guest.connect(&serving.socket, "vm");
    assert_eq!(guest.touch(0).join(), word(0, 0));
    // The only page there is, is taken.
    let waiter = guest.touch(1);
    serving.wait(
        "no-memory",
        |what| matches!(what, What::NoMemory { address, .. } if *address == guest.address(1)),
    );
    assert!(waiter.still_runs());
    assert!(pool.set(2));
    assert_eq!(waiter.join(), word(HUGE as u64, 0));
    // It is told again when it comes again.
    let waiter = guest.touch(2);
    serving.wait(
        "no-memory",
        |what| matches!(what, What::NoMemory { address, .. } if *address == guest.address(2)),
    );
    assert!(pool.set(3));
    assert_eq!(waiter.join(), word(2 * HUGE as u64, 0));
    assert_eq!(serving.session("vm").stats().snapshot().counters.failures, 0);
}

#[test]
fn population_that_finds_the_pool_empty_goes_on_once_there_are_pages() {
    need_userfaultfd!();
    let Some(pool) = Pool::of(1) else { return };
    let guest = Guest::new(Backing::Hugetlb, 4);
    let mut serving = Serving::new(Arc::new(Snapshot::new(guest.layout.end())), populating());
    let _socket = guest.connect(&serving.socket, "vm");
    serving.wait("no-memory", |what| matches!(what, What::NoMemory { .. }));
    assert!(pool.set(4));
    serving.wait("populated", |what| matches!(what, What::Populated { failed: 0, .. }));
    assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0]);
}

/// A store to a huge page that the pool does not have is a SIGBUS, and the kernel rounds a mapping of such a file up to its pages.
#[test]
fn a_memory_file_of_huge_pages_is_neither_mapped_nor_trusted() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(file) = rustix::fs::memfd_create("huge", flags) else {
        eprintln!("skipped: this kernel makes no memory files of huge pages");
        return;
    };
    rustix::fs::ftruncate(&file, 2 * HUGE as u64).unwrap();
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL).unwrap();
    for length in [HUGE + HUGE / 2, 2 * HUGE] {
        assert!(matches!(memfd::check_sealed(file.as_fd(), length as u64), Err(NotSealed::HugePages)));
        assert_eq!(Mapping::shared(file.as_fd(), 0, length).unwrap_err().errno, Errno::INVAL);
        assert_eq!(Mapping::private(file.as_fd(), 0, length).unwrap_err().errno, Errno::INVAL);
    }
    assert_eq!(Mapping::hugetlb_unreserved(HUGE + 4096).unwrap_err().errno, Errno::INVAL);
}
