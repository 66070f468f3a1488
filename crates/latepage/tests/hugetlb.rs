//! Memory in pages of 2 MiB, and a pool that has too few of them. Tests here share the machine's pool: each takes it in turn,
//! and gives it back as it found it.

mod vmm;

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use latepage::attachment::Backing;
use latepage::memory::{Layout, PageSize, Region};
use latepage::pager::What;
use latepage::sys::mapping::Mapping;
use latepage::sys::uffd::{Features, RegisterMode, Userfaultfd};
use rustix::fs::{MemfdFlags, SealFlags};
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

/// Huge pages of a memory file that is sent too: filled through the pager's own view of it. There is no ZEROPAGE for these.
#[test]
fn huge_pages_of_a_shared_file_are_filled_through_the_install_view() {
    need_userfaultfd!();
    let Some(_pool) = Pool::of(8) else { return };
    for population in [policy(), populating()] {
        let bytes = 6 * HUGE;
        let flags =
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let file = rustix::fs::memfd_create("huge", flags).unwrap();
        rustix::fs::ftruncate(&file, bytes as u64).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL).unwrap();
        let view = Mapping::shared(file.as_fd(), 0, bytes).unwrap();
        let features = Features::MISSING_HUGETLBFS | Features::MINOR_HUGETLBFS | Features::EVENT_REMOVE;
        let uffd = Userfaultfd::create(features).unwrap();
        uffd.register(view.address(), bytes as u64, RegisterMode::MISSING | RegisterMode::MINOR).unwrap();
        let region = Region {
            gpa: None,
            hva: view.address(),
            size: bytes as u64,
            offset: 0,
            page_size: PageSize::Huge,
        };
        let guest = Guest {
            layout: Layout::new(vec![region]).unwrap(),
            view: Arc::new(view),
            uffd,
            memory: Some(file),
            backing: Backing::Hugetlb,
            page: HUGE,
        };
        // The third page is zero throughout.
        let mut serving = Serving::new(Arc::new(ZeroInTheMiddle(bytes as u64)), population);
        let _socket = guest.connect(&serving.socket, "vm");
        let expected = |offset: u64| if offset / HUGE as u64 == 2 { 0 } else { word(offset, 0) };
        assert_eq!(guest.verify(5, expected).join(), [0; 0]);
        let mapped = Arc::clone(&guest.view);
        vmm::start(move || mapped.remove(HUGE, HUGE).unwrap()).join();
        assert_eq!(guest.read(1).join(), vec![0; HUGE]);
        assert_eq!(guest.touch(5).join(), word(5 * HUGE as u64, 0));
        assert_eq!(serving.session("vm").stats().snapshot().counters.failures, 0);
    }
}

/// A snapshot in huge pages, of which the third is a hole.
struct ZeroInTheMiddle(u64);

impl latepage::source::Source for ZeroInTheMiddle {
    fn describe(&self) -> String {
        "snapshot".to_owned()
    }

    fn size(&self) -> u64 {
        self.0
    }

    fn ask<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<latepage::source::Answer<'a>, latepage::source::SourceError> {
        self.wait(offset, length, unit, scratch)
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        _length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<latepage::source::Answer<'a>, latepage::source::SourceError> {
        if offset / HUGE as u64 == 2 {
            return Ok(latepage::source::Answer::Zero(unit as u64));
        }
        for (at, bytes) in scratch[..unit].chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&word(offset + at as u64 * 8, 0).to_le_bytes());
        }
        Ok(latepage::source::Answer::Bytes(&scratch[..unit]))
    }
}
