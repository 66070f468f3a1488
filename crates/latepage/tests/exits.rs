//! Guests of ordinary threads whose accesses come back to them as signals (UFFD_FEATURE_SIGBUS): resolved in the handler, on the faulting
//! thread (`exit`), or posted to a pager through the channel (`notify`).

mod vmm;

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use latepage::attachment::Backing;
use latepage::attachment::native::{self, BesideChannel};
use latepage::delivery::channel::{Channel, Completion, Request, Waited};
use latepage::memory::{Layout, PageSize, Region};
use latepage::session::{FaultWindow, Reason, Resolver, ResolverStats, Unresolved};
use latepage::sys::mapping::Mapping;
use latepage::sys::memfd;
use latepage::sys::uffd::{Features, RegisterMode, Userfaultfd};

use vmm::guest::say;
use vmm::serving::{Serving, policy};
use vmm::snapshot::Snapshot;
use vmm::trap::trapping;
use vmm::{PAGE, start};

const PAGES: usize = 4096;

/// Guest memory, nothing of which is there.
struct Guest {
    view: Mapping,
    memory: Option<OwnedFd>,
    layout: Layout,
}

impl Guest {
    fn new(backing: Backing) -> Self {
        let length = PAGES * PAGE;
        let (view, memory) = match backing {
            Backing::Shared => {
                let file = memfd::create("guest", length as u64).unwrap();
                (Mapping::shared(file.as_fd(), 0, length).unwrap(), Some(file))
            }
            _ => (Mapping::anonymous(length).unwrap(), None),
        };
        let (hva, size) = (view.address(), length as u64);
        let layout =
            Layout::new(vec![Region { gpa: Some(0), hva, size, offset: 0, page_size: PageSize::Small }])
                .unwrap();
        Self { view, memory, layout }
    }

    /// A resolver whose absent pages are signals.
    fn resolver(&self, source: &Arc<Snapshot>, seats: usize, window: u64) -> Arc<Resolver> {
        let window = FaultWindow::bytes(window).unwrap();
        Resolver::by_signal(self.layout.clone(), Arc::clone(source) as _, seats, window).unwrap()
    }

    /// What `accesses` returns, whose signals are resolved from that seat; and what could not be.
    fn with_seat<R>(
        resolver: &Arc<Resolver>,
        number: usize,
        accesses: impl FnOnce() -> R,
    ) -> (R, Option<Unresolved>) {
        let seat = RefCell::new((resolver.seat(number).unwrap(), None));
        let resolve = |address| {
            let (seat, unresolved) = &mut *seat.borrow_mut();
            *unresolved = seat.touch(address).err();
            unresolved.is_none()
        };
        let result = trapping(&resolve, accesses);
        (result, seat.into_inner().1)
    }

    /// Every page, in an order of this thread's own.
    fn check(&self, number: usize, source: &Snapshot) {
        for turn in 0..PAGES {
            let page = (turn * 7 + number * 129) % PAGES;
            assert_eq!(self.view.load(page * PAGE), source.word((page * PAGE) as u64), "page {page}");
        }
    }

    fn discard(&self, resolver: &Resolver, page: usize) {
        let pages = page as u32..page as u32 + 1;
        let punch = || match self.memory {
            Some(_) => self.view.remove(page * PAGE, PAGE),
            None => self.view.dont_need(page * PAGE, PAGE),
        };
        resolver.discard(pages, punch).unwrap();
    }
}

#[test]
fn signals_are_resolved_by_many_threads_at_once_and_no_page_is_brought_twice() {
    need_userfaultfd!();
    for backing in [Backing::Anonymous, Backing::Shared] {
        let guest = Arc::new(Guest::new(backing));
        let source = Arc::new(Snapshot::new((PAGES * PAGE) as u64));
        let resolver = guest.resolver(&source, 24, 32 << 10);
        let vcpus: Vec<_> = (0..24)
            .map(|number| {
                let (guest, source, resolver) =
                    (Arc::clone(&guest), Arc::clone(&source), Arc::clone(&resolver));
                start(move || Guest::with_seat(&resolver, number, || guest.check(number, &source)).1)
            })
            .collect();
        assert!(vcpus.into_iter().all(|vcpu| vmm::Running::join(vcpu).is_none()));
        let ResolverStats { exits, faults, joined, present, filled, zero, beside } = resolver.stats();
        assert_eq!((filled + zero, resolver.pages().lacking()), (PAGES as u64, 0), "{backing}");
        assert_eq!((exits - joined - present, faults), (filled + zero - beside, 0), "{backing}");
    }
}

#[test]
fn what_is_discarded_among_signals_is_never_the_snapshots_again() {
    need_userfaultfd!();
    for backing in [Backing::Anonymous, Backing::Shared] {
        let guest = Arc::new(Guest::new(backing));
        let source = Arc::new(Snapshot::new((PAGES * PAGE) as u64));
        let resolver = guest.resolver(&source, 5, 16 << 10);
        let vcpus: Vec<_> = (0..4)
            .map(|number| {
                let (guest, source, resolver) =
                    (Arc::clone(&guest), Arc::clone(&source), Arc::clone(&resolver));
                start(move || {
                    let accesses = || {
                        for page in (0..PAGES).map(|turn| (turn * 5 + number) % PAGES) {
                            let (word, snapshot) =
                                (guest.view.load(page * PAGE), source.word((page * PAGE) as u64));
                            assert!(word == 0 || word == snapshot, "page {page}: {word:#x}");
                        }
                    };
                    Guest::with_seat(&resolver, number, accesses).1
                })
            })
            .collect();
        (0..PAGES).step_by(2).for_each(|page| guest.discard(&resolver, page));
        assert!(vcpus.into_iter().all(|vcpu| vmm::Running::join(vcpu).is_none()));
        let check = || {
            for page in 0..PAGES {
                let expected = if page % 2 == 0 { 0 } else { source.word((page * PAGE) as u64) };
                assert_eq!(guest.view.load(page * PAGE), expected, "{backing}, page {page}");
            }
        };
        assert_eq!(Guest::with_seat(&resolver, 4, check).1, None);
    }
}

#[test]
fn a_page_that_cannot_be_had_is_told_to_whoever_touches_it() {
    need_userfaultfd!();
    for backing in [Backing::Anonymous, Backing::Shared] {
        let guest = Guest::new(backing);
        let source = Arc::new(Snapshot::new((PAGES * PAGE) as u64).broken([9]));
        let resolver = guest.resolver(&source, 1, 64 << 10);
        let mut seat = resolver.seat(0).unwrap();
        let touch = |page: usize| guest.view.address() + (page * PAGE) as u64;
        // What lies before it in the window comes.
        seat.touch(touch(2)).unwrap();
        let told = seat.touch(touch(9)).unwrap_err().to_string();
        assert!(told.starts_with("the memory at guest address 0x9000 could not be had: "), "{told}");
        assert_eq!(seat.exit(9 * PAGE as u64 + 8).unwrap_err().reason, Reason::Before);
        seat.touch(touch(10)).unwrap();
        assert_eq!(guest.view.load(10 * PAGE), source.word(10 * PAGE as u64));
        // A system call is told by an error, and never sees zero.
        let mut word = [0; 8];
        assert_eq!(guest.view.window(9 * PAGE, 8).copy_to(&mut word), Err(rustix::io::Errno::FAULT));
        assert_eq!(resolver.stats().beside, 7 - 1 + 6 - 1);
    }
}

/// It would cost each fault a sixth, and find nothing: what is there was mapped as it came.
#[test]
fn the_kernel_does_not_look_around_a_page_that_is_read() {
    need_userfaultfd!();
    if !Userfaultfd::offered().unwrap().contains(Features::WP_HUGETLBFS_SHMEM) {
        return eprintln!("skipped: it takes write-protection of shared memory (Linux 5.19)");
    }
    let guest = Guest::new(Backing::Shared);
    let source = Arc::new(Snapshot::new((PAGES * PAGE) as u64));
    let resolver = guest.resolver(&source, 1, PAGE as u64);
    // The memory file has the neighbour, and the guest view does not show it: just what the kernel would map on the way.
    rustix::io::pwrite(guest.memory.as_ref().unwrap(), &[7; PAGE], PAGE as u64).unwrap();
    let is_mapped = |page: usize| {
        let (mut entry, pagemap) = ([0; 8], std::fs::File::open("/proc/self/pagemap").unwrap());
        rustix::io::pread(&pagemap, &mut entry, (guest.view.address() / PAGE as u64 + page as u64) * 8)
            .unwrap();
        entry[7] >> 7 == 1
    };
    let (word, unresolved) = Guest::with_seat(&resolver, 0, || guest.view.load(0));
    assert_eq!((word, unresolved), (source.word(0), None));
    assert_eq!((is_mapped(0), is_mapped(1)), (true, false));
}

#[test]
fn traps_are_posted_to_a_pager_and_each_thread_waits_at_its_slot() {
    need_userfaultfd!();
    let source = Arc::new(Snapshot::new((PAGES * PAGE) as u64));
    let mut serving = Serving::new(source.clone(), policy());
    let guest = Arc::new(Guest::new(Backing::Shared));
    let uffd =
        Userfaultfd::create(Features::SIGBUS | Features::MISSING_SHMEM | Features::MINOR_SHMEM).unwrap();
    let modes = RegisterMode::MISSING | RegisterMode::MINOR;
    uffd.register(guest.view.address(), (PAGES * PAGE) as u64, modes).unwrap();
    let channel = Arc::new(Channel::new(24, PAGES as u32).unwrap());
    let introduction = native::Introduction {
        name: Some("vm"),
        vcpus: 24,
        backing: Backing::Shared,
        memory: true,
        layout: &guest.layout,
    };
    // The pager exposes by the userfaultfd; nobody's fault is read from it.
    let message = native::message_with_channel(
        &introduction,
        BesideChannel { userfaultfd: true, ..BesideChannel::default() },
    );
    let (memory, bell) = channel.descriptors();
    let sent = [memory, bell, guest.memory.as_ref().unwrap().as_fd(), uffd.as_fd()];
    let _socket = say(&serving.socket, message.as_bytes(), &sent);
    let vcpus: Vec<_> = (0..24)
        .map(|number| {
            let (guest, source, channel) = (Arc::clone(&guest), Arc::clone(&source), Arc::clone(&channel));
            start(move || {
                let seat = RefCell::new(channel.seat(number).unwrap());
                let resolve = |address| {
                    let (mut seat, Some(page)) = (seat.borrow_mut(), guest.layout.find_hva(address)) else {
                        return false;
                    };
                    let request = Request::Fault { page, write: false, thread: number };
                    seat.post(&request).is_ok()
                        && matches!(seat.wait(100, Some(vmm::BOUND)), Waited::Over(Completion::Done(_)))
                };
                trapping(&resolve, || guest.check(number as usize, &source));
            })
        })
        .collect();
    vcpus.into_iter().for_each(vmm::Running::join);
    let session = serving.session("vm");
    let counters = session.stats().counters.snapshot();
    assert_eq!((session.owed(), counters.bytes_installed), (0, (PAGES * PAGE) as u64));
}
