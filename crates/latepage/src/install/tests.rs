//! Every answer of the kernel that can be provoked in one process, and what it is taken for. Skipped, with a reason, where there
//! is no userfaultfd.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::{CopyInstall, Install, InstallView, MinorInstall, Outcome, SharedInstall, Stop};
use crate::memory::{Layout, PageSize, Region};
use crate::sys::mapping::Mapping;
use crate::sys::memfd;
use crate::sys::uffd::{Features, MessageBuffer, RegisterMode, Userfaultfd};

const PAGE: usize = 4096;
const DONE: fn(u32) -> Outcome = |pages| Outcome { pages, stopped: None };
const STOPPED: fn(Stop) -> Outcome = |stop| Outcome { pages: 0, stopped: Some(stop) };

struct Made {
    view: Arc<Mapping>,
    layout: Layout,
    uffd: Arc<Userfaultfd>,
    file: Option<OwnedFd>,
}

#[derive(Clone, Copy, PartialEq)]
enum Of {
    Anonymous,
    Shared,
    Private,
}

fn made(of: Of, pages: usize) -> Option<Made> {
    let features =
        Features::EVENT_REMOVE | Features::MISSING_SHMEM | Features::MINOR_SHMEM | Features::POISON;
    let uffd = match Userfaultfd::create(features) {
        Ok(uffd) => Arc::new(uffd),
        Err(error) => {
            eprintln!("skipped: {error}");
            return None;
        }
    };
    let length = pages * PAGE;
    let file = (of != Of::Anonymous).then(|| memfd::create("t", length as u64).unwrap());
    let view = match (&file, of) {
        (Some(file), Of::Shared) => Mapping::shared(file.as_fd(), 0, length),
        (Some(file), _) => Mapping::private(file.as_fd(), 0, length),
        (None, _) => Mapping::anonymous(length),
    }
    .unwrap();
    let minor = if file.is_some() { RegisterMode::MINOR } else { RegisterMode::empty() };
    uffd.register(view.address(), length as u64, RegisterMode::MISSING | minor).unwrap();
    let (hva, size) = (view.address(), length as u64);
    let layout =
        Layout::new(vec![Region { gpa: None, hva, size, offset: 0, page_size: PageSize::Small }]).unwrap();
    Some(Made { view: Arc::new(view), layout, uffd, file })
}

fn made_private() -> Option<Made> {
    made(Of::Private, 4)
}

impl Made {
    fn copy(&self) -> CopyInstall {
        CopyInstall::new(Arc::clone(&self.uffd))
    }

    fn minor(&self) -> MinorInstall {
        let view = MinorInstall::map(self.file.as_ref().unwrap(), &self.layout).unwrap();
        MinorInstall::new(Arc::clone(&self.uffd), view)
    }
}

#[test]
fn a_copy_is_seen_at_once() {
    let Some(made) = made(Of::Anonymous, 4) else { return };
    let install = made.copy();
    assert!(install.fill_exposes());
    assert_eq!(install.fill(&made.layout, 1, &[7; 2 * PAGE]), DONE(2));
    assert_eq!(install.zero(&made.layout, 0..1), DONE(1));
    assert_eq!((made.view.load(0), made.view.load(2 * PAGE)), (0, u64::from_ne_bytes([7; 8])));
    assert_eq!(install.fill(&made.layout, 2, &[8; PAGE]), STOPPED(Stop::AlreadyThere));
    assert_eq!(made.view.load(2 * PAGE), u64::from_ne_bytes([7; 8]));
}

#[test]
fn a_run_stops_without_a_reason_before_a_page_that_is_there_and_with_one_at_it() {
    let Some(made) = made(Of::Anonymous, 8) else { return };
    let install = made.copy();
    assert_eq!(install.fill(&made.layout, 3, &[1; PAGE]), DONE(1));
    assert_eq!(install.fill(&made.layout, 0, &[2; 8 * PAGE]), DONE(3));
    assert_eq!(install.fill(&made.layout, 3, &[2; 5 * PAGE]), STOPPED(Stop::AlreadyThere));
    assert_eq!(install.zero(&made.layout, 4..8), DONE(4));
}

#[test]
fn while_a_removal_is_unread_every_install_is_busy() {
    for of in [Of::Anonymous, Of::Shared, Of::Private] {
        let Some(made) = made(of, 8) else { return };
        let copy = made.copy();
        let minor = made.file.is_some().then(|| made.minor());
        if let Some(minor) = &minor {
            minor.fill(&made.layout, 5, &[9; PAGE]);
        }
        let view = Arc::clone(&made.view);
        let balloon = std::thread::spawn(move || view.dont_need(0, PAGE).unwrap());
        rustix::event::poll(&mut [PollFd::new(&made.uffd, PollFlags::IN)], None).unwrap();
        assert!(copy.is_changing() && copy.has_memory());
        assert_eq!(copy.fill(&made.layout, 4, &[1; PAGE]), STOPPED(Stop::Busy));
        assert_eq!(copy.zero(&made.layout, 4..5), STOPPED(Stop::Busy));
        assert_eq!(copy.poison(&made.layout, 4..5), STOPPED(Stop::Busy));
        if let Some(minor) = &minor {
            assert_eq!(minor.expose(&made.layout, 5..6), STOPPED(Stop::Busy));
        }
        // Read, and the discarding thread has run: all goes on.
        let mut buffer = MessageBuffer::new(4);
        assert_eq!(made.uffd.read(&mut buffer), Ok(1));
        balloon.join().unwrap();
        assert!(!copy.is_changing());
        match &minor {
            Some(minor) => assert_eq!(minor.expose(&made.layout, 5..6), DONE(1)),
            None => assert_eq!(copy.fill(&made.layout, 4, &[1; PAGE]), DONE(1)),
        }
    }
}

#[test]
fn a_range_that_is_not_registered_is_unmapped() {
    for of in [Of::Anonymous, Of::Shared] {
        let Some(made) = made(of, 8) else { return };
        let copy = made.copy();
        made.uffd.unregister(made.view.address(), 4 * PAGE as u64).unwrap();
        assert_eq!(copy.fill(&made.layout, 1, &[1; PAGE]), STOPPED(Stop::Unmapped));
        assert_eq!(copy.zero(&made.layout, 1..2), STOPPED(Stop::Unmapped));
        // Across its end, the whole run is.
        assert_eq!(copy.fill(&made.layout, 3, &[1; 2 * PAGE]), STOPPED(Stop::Unmapped));
        assert_eq!(copy.fill(&made.layout, 4, &[1; PAGE]), DONE(1));
    }
}

#[test]
fn what_is_filled_is_seen_only_once_it_is_exposed() {
    for of in [Of::Shared, Of::Private] {
        let Some(made) = made(of, 4) else { return };
        let install = made.minor();
        assert!(!install.fill_exposes());
        assert_eq!(install.fill(&made.layout, 1, &[7; 2 * PAGE]), DONE(2));
        assert_eq!(install.expose(&made.layout, 1..3), DONE(2));
        assert_eq!(made.view.load(2 * PAGE), u64::from_ne_bytes([7; 8]));
        assert_eq!(install.expose(&made.layout, 1..3), STOPPED(Stop::AlreadyThere));
        // A hole is exposed as zero.
        assert_eq!(install.expose(&made.layout, 3..4), DONE(1));
        assert_eq!(made.view.load(3 * PAGE), 0);
    }
}

#[test]
fn zero_in_a_file_that_has_the_page_is_already_there() {
    let Some(made) = made(Of::Shared, 4) else { return };
    let install = made.minor();
    install.fill(&made.layout, 1, &[7; PAGE]);
    assert_eq!(install.zero(&made.layout, 1..2), STOPPED(Stop::AlreadyThere));
    assert_eq!(install.zero(&made.layout, 2..3), DONE(1));
    // A private mapping has its own page, whatever the file holds.
    let Some(made) = made_private() else { return };
    let install = made.minor();
    install.fill(&made.layout, 1, &[7; PAGE]);
    assert_eq!(install.zero(&made.layout, 1..2), DONE(1));
    assert_eq!(made.view.load(PAGE), 0);
}

#[test]
fn a_copy_into_shared_memory_never_leaves_what_its_file_had_there() {
    let Some(made) = made(Of::Shared, 8) else { return };
    let stale = made.minor();
    stale.fill(&made.layout, 2, &[9; 4 * PAGE]);
    let view = InstallView::map(made.file.as_ref().unwrap(), &made.layout).unwrap();
    let install = SharedInstall::new(Arc::clone(&made.uffd), view);
    assert!(install.fill_exposes() && install.may_hold_anything());
    // Up to the first page that the file has, and then one by one.
    assert_eq!(install.fill(&made.layout, 0, &[1; 4 * PAGE]), DONE(2));
    assert_eq!(install.fill(&made.layout, 2, &[2; 2 * PAGE]), DONE(1));
    let contents = Mapping::anonymous(2 * PAGE).unwrap();
    contents.write(0, &[3; 2 * PAGE]);
    assert_eq!(install.fill_window(&made.layout, 3, contents.window(0, 2 * PAGE)), DONE(1));
    // Zero is told of it, and removed pages keep it.
    assert_eq!(install.zero(&made.layout, 4..6), STOPPED(Stop::AlreadyThere));
    assert_eq!(install.expose(&made.layout, 4..5), DONE(1));
    assert_eq!(install.fill(&made.layout, 5, &[0; PAGE]), DONE(1));
    assert_eq!(install.fill_window(&made.layout, 6, contents.window(0, 2 * PAGE)), DONE(2));
    let seen: Vec<u8> = (0..8).map(|page| made.view.load(page * PAGE) as u8).collect();
    assert_eq!(seen, [1, 1, 2, 3, 9, 0, 3, 3]);
    // What the guest sees already is told of, and written over all the same: nobody else may have put it there.
    assert_eq!(install.fill(&made.layout, 7, &[4; PAGE]), STOPPED(Stop::AlreadyThere));
    assert_eq!(install.fill_window(&made.layout, 6, contents.window(0, PAGE)), STOPPED(Stop::AlreadyThere));
    let mut seen = [0; 2 * PAGE];
    made.view.read(6 * PAGE, &mut seen);
    assert!(seen[..PAGE] == [3; PAGE] && seen[PAGE..] == [4; PAGE]);
}

#[test]
fn memory_that_is_let_go_faults_no_more() {
    let Some(made) = made(Of::Anonymous, 4) else { return };
    let install = made.copy();
    install.detach(&made.layout, 0..made.layout.pages()).unwrap();
    install.detach(&made.layout, 0..made.layout.pages()).unwrap();
    assert_eq!(made.view.load(0), 0);
    made.view.dont_need(0, 4 * PAGE).unwrap();
    assert!(install.has_memory());
}

#[test]
fn every_errno_has_a_meaning() {
    let outcome = |bytes: u64, errno: Option<Errno>| {
        Outcome::new(crate::sys::uffd::Installed { bytes, stopped: errno }, 4096)
    };
    assert_eq!(outcome(8192, None), DONE(2));
    assert_eq!(outcome(4096, Some(Errno::AGAIN)), DONE(1));
    for (errno, stop) in [
        (Errno::AGAIN, Stop::Busy),
        (Errno::EXIST, Stop::AlreadyThere),
        (Errno::NOMEM, Stop::NoMemory),
        (Errno::NOENT, Stop::Unmapped),
        (Errno::SRCH, Stop::Gone),
        (Errno::FAULT, Stop::Hole),
        (Errno::INVAL, Stop::Failed(Errno::INVAL)),
    ] {
        assert_eq!(outcome(0, Some(errno)), STOPPED(stop));
    }
}
