//! Guests of ordinary threads whose accesses come back to them (UFFD_FEATURE_SIGBUS stands in for memory-fault exits): resolved in the
//! faulting thread (`exit`), or posted to a pager through the channel (`notify`).

mod vmm;

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use latepage::attachment::Backing;
use latepage::attachment::native::{self, BesideChannel};
use latepage::delivery::channel::{Channel, Completion, Request, Waited};
use latepage::install::{CopyInstall, Install, InstallView, MinorInstall};
use latepage::memory::{Layout, PageSize, Region};
use latepage::session::exit::Exits;
use latepage::sys::mapping::Mapping;
use latepage::sys::memfd;
use latepage::sys::uffd::{Features, RegisterMode, Userfaultfd};

use vmm::guest::say;
use vmm::serving::{Serving, policy};
use vmm::snapshot::Snapshot;
use vmm::trap::trapping;
use vmm::{PAGE, start};

const PAGES: usize = 4096;

/// Guest memory that traps to whoever touches it.
struct Guest {
    view: Mapping,
    memory: Option<OwnedFd>,
    uffd: Arc<Userfaultfd>,
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
        let features = Features::SIGBUS | Features::MISSING_SHMEM | Features::MINOR_SHMEM;
        let uffd = Arc::new(Userfaultfd::create(features).unwrap());
        let minor = if memory.is_some() { RegisterMode::MINOR } else { RegisterMode::empty() };
        uffd.register(view.address(), length as u64, RegisterMode::MISSING | minor).unwrap();
        let (hva, size) = (view.address(), length as u64);
        let layout =
            Layout::new(vec![Region { gpa: Some(0), hva, size, offset: 0, page_size: PageSize::Small }])
                .unwrap();
        Self { view, memory, uffd, layout }
    }

    /// Every page, in an order of this thread's own.
    fn check(&self, number: usize, source: &Snapshot) {
        for turn in 0..PAGES {
            let page = (turn * 7 + number * 129) % PAGES;
            assert_eq!(self.view.load(page * PAGE), source.word((page * PAGE) as u64), "page {page}");
        }
    }
}

#[test]
fn exits_are_resolved_by_many_threads_at_once_and_no_page_is_brought_twice() {
    need_userfaultfd!();
    for backing in [Backing::Anonymous, Backing::Shared] {
        let guest = Arc::new(Guest::new(backing));
        let source = Arc::new(Snapshot::new((PAGES * PAGE) as u64));
        let install: Box<dyn Install> = match &guest.memory {
            Some(memory) => {
                let view = InstallView::map(memory, &guest.layout).unwrap();
                Box::new(MinorInstall::new(Arc::clone(&guest.uffd), view))
            }
            None => Box::new(CopyInstall::new(Arc::clone(&guest.uffd))),
        };
        let exits = Arc::new(Exits::new(guest.layout.clone(), source.clone(), install, 32 << 10));
        let vcpus: Vec<_> = (0..24)
            .map(|number| {
                let (guest, source, exits) = (Arc::clone(&guest), Arc::clone(&source), Arc::clone(&exits));
                start(move || {
                    let buffer = RefCell::new(vec![0; 32 << 10]);
                    let resolve = |address| {
                        let page = exits.layout().find_hva(address);
                        page.is_some_and(|page| exits.resolve(page, number, &mut buffer.borrow_mut()).is_ok())
                    };
                    trapping(&resolve, || guest.check(number, &source));
                })
            })
            .collect();
        vcpus.into_iter().for_each(vmm::Running::join);
        assert_eq!((exits.brought(), exits.pages().lacking()), (PAGES as u64, 0));
    }
}

#[test]
fn traps_are_posted_to_a_pager_and_each_thread_waits_at_its_slot() {
    need_userfaultfd!();
    let source = Arc::new(Snapshot::new((PAGES * PAGE) as u64));
    let mut serving = Serving::new(source.clone(), policy());
    let guest = Arc::new(Guest::new(Backing::Shared));
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
    let sent = [memory, bell, guest.memory.as_ref().unwrap().as_fd(), guest.uffd.as_fd()];
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
