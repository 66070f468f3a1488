//! Every page a guest sees is the snapshot's, or zero if it discarded it: every backing, with population and without, while a
//! balloon discards. Against a real userfaultfd over this process's memory.

mod vmm;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use latepage::attachment::{Backing, Form};
use latepage::pager::What;
use latepage::session::{FaultAround, Policy};
use latepage::source::{Answer, Source, SourceError};
use latepage::sys::uffd::RegisterMode;
use vmm::guest::{Guest, Make};
use vmm::serving::{Serving, policy, populating};
use vmm::snapshot::{Snapshot, word};
use vmm::{PAGE, start, until};

const SMALL: [Backing; 3] = [Backing::Anonymous, Backing::Private, Backing::Shared];

fn served(guest: &Guest, policy: Policy) -> Serving {
    Serving::new(Arc::new(Snapshot::new(guest.layout.end())), policy)
}

#[test]
fn every_backing_reads_its_snapshot_in_any_order() {
    need_userfaultfd!();
    for backing in SMALL {
        for population in [policy(), populating()] {
            let guest = Guest::new(backing, 1000);
            let serving = served(&guest, population.clone());
            let _socket = guest.connect(&serving.socket, "vm");
            let threads: Vec<_> = [1, 7, 333, 611]
                .into_iter()
                .map(|stride| guest.verify(stride, |offset| word(offset, 0)))
                .collect();
            for thread in threads {
                assert_eq!(thread.join(), [0; 0], "{backing} {population:?}");
            }
        }
    }
}

#[test]
fn a_wrong_byte_is_seen_and_named() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 64);
    let serving = served(&guest, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    let last = (9 * PAGE - 8) as u64;
    let wrong =
        guest.verify(1, move |offset| if offset == last { word(offset, 0) ^ 1 } else { word(offset, 0) });
    assert_eq!(wrong.join(), [8]);
}

#[test]
fn firecrackers_form_is_served_as_ours_is() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 200);
    let mut serving = served(&guest, policy());
    let socket = guest.connect_as(Form::Firecracker, &serving.socket, "");
    // Old Firecrackers close it at once; the session goes on.
    drop(socket);
    assert_eq!(guest.verify(3, |offset| word(offset, 0)).join(), [0; 0]);
    serving.ever("session-started", |what| matches!(what, What::SessionStarted { form: "firecracker", .. }));
}

#[test]
fn population_alone_brings_every_page() {
    need_userfaultfd!();
    for backing in SMALL {
        let guest = Guest::new(backing, 2000);
        let mut serving = served(&guest, populating());
        let _socket = guest.connect(&serving.socket, "vm");
        serving.wait("populated", |what| matches!(what, What::Populated { failed: 0, .. }));
        let session = serving.session("vm");
        assert_eq!((session.owed(), session.pages().lacking()), (0, 0));
        assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0], "{backing}");
    }
}

#[test]
fn a_discarded_page_reads_zero_and_never_the_snapshot() {
    need_userfaultfd!();
    for backing in SMALL {
        for population in [policy(), populating()] {
            let guest = Guest::new(backing, 300);
            let mut serving = served(&guest, population);
            let _socket = guest.connect(&serving.socket, "vm");
            // Half of them have been seen before they go, and half never were.
            for page in 0..50 {
                assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0));
            }
            guest.discard(0, 100).join();
            for round in 0..3 {
                for page in 0..100 {
                    assert_eq!(guest.read(page).join(), vec![0; PAGE], "{backing} round {round} page {page}");
                }
                guest.discard(0, 100).join();
            }
            // The rest is the snapshot's.
            for page in 100..300 {
                assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0), "{backing}");
            }
            assert!(serving.session("vm").stats().snapshot().counters.removed_pages >= 100);
        }
    }
}

#[test]
fn what_is_written_after_a_discard_stays() {
    need_userfaultfd!();
    for backing in SMALL {
        let guest = Guest::new(backing, 64);
        let serving = served(&guest, populating());
        let _socket = guest.connect(&serving.socket, "vm");
        for page in 0..64 {
            guest.discard(page, 1).join();
            guest.write(page, 77).join();
            assert_eq!(guest.touch(page).join(), 77, "{backing}");
        }
        assert_eq!(guest.verify(1, |offset| if offset % PAGE as u64 == 0 { 77 } else { 0 }).join(), [0; 0]);
    }
}

#[test]
fn discarding_shared_memory_without_its_file_keeps_what_the_file_holds() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Shared, 32);
    let mut serving = served(&guest, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    guest.write(3, 42).join();
    // MADV_DONTNEED drops the mapping of it, not the file's page.
    let view = Arc::clone(&guest.view);
    start(move || view.dont_need(3 * PAGE, PAGE).unwrap()).join();
    assert_eq!(guest.touch(3).join(), 42);
    assert_eq!(serving.session("vm").stats().snapshot().counters.removed_pages, 1);
}

/// Each page is first the snapshot's; a balloon takes it away; whoever touches it again sees zero, or what was written since.
#[test]
fn a_storm_of_discards_beside_population_never_brings_a_page_back() {
    need_userfaultfd!();
    const PAGES: usize = 1200;
    const WRITTEN: u64 = 0xABCD_EF01;
    for backing in SMALL {
        let guest = Guest::new(backing, PAGES);
        let mut serving = served(&guest, populating());
        let discarded: Arc<Vec<AtomicU32>> = Arc::new((0..PAGES).map(|_| AtomicU32::new(0)).collect());
        let over = Arc::new(AtomicBool::new(false));
        // Faults come before the handshake, so that the storm meets population at its height.
        let readers: Vec<_> = (0..2usize)
            .map(|number| {
                let (view, discarded, over) =
                    (Arc::clone(&guest.view), Arc::clone(&discarded), Arc::clone(&over));
                start(move || {
                    let mut wrong = Vec::new();
                    for turn in 0.. {
                        if over.load(Ordering::Acquire) {
                            break;
                        }
                        let page = (turn * 7 + number * 600) % PAGES;
                        let gone = discarded[page].load(Ordering::Acquire) > 0;
                        let found = view.load(page * PAGE + 8);
                        let snapshot = word((page * PAGE + 8) as u64, 0);
                        let right = found == 0 || found == WRITTEN || !gone && found == snapshot;
                        if !right {
                            wrong.push((page, found));
                        }
                    }
                    wrong
                })
            })
            .collect();
        let balloon = {
            let (view, discarded) = (Arc::clone(&guest.view), Arc::clone(&discarded));
            start(move || {
                for turn in 0..3000 {
                    let page = turn * 11 % (PAGES - 8);
                    let pages = 1 + turn % 8;
                    let (at, length) = (page * PAGE, pages * PAGE);
                    if backing == Backing::Shared {
                        view.remove(at, length)
                    } else {
                        view.dont_need(at, length)
                    }
                    .unwrap();
                    for gone in &discarded[page..page + pages] {
                        gone.fetch_add(1, Ordering::AcqRel);
                    }
                    if turn % 4 == 0 {
                        view.store(at + 8, WRITTEN);
                    }
                }
            })
        };
        let _socket = guest.connect(&serving.socket, "vm");
        balloon.join();
        over.store(true, Ordering::Release);
        for reader in readers {
            assert_eq!(reader.join(), [(0, 0); 0], "{backing}");
        }
        serving.ever("populated", |what| matches!(what, What::Populated { failed: 0, .. }));
    }
}

#[test]
fn private_memory_stays_zero_however_often_it_is_discarded() {
    need_userfaultfd!();
    // With and without an event for it: the file still holds the snapshot's page.
    let guest = Guest::new(Backing::Private, 8);
    let serving = served(&guest, populating());
    let _socket = guest.connect(&serving.socket, "vm");
    assert_eq!(guest.touch(1).join(), word(PAGE as u64, 0));
    for _ in 0..50 {
        guest.discard(1, 1).join();
        assert_eq!(guest.read(1).join(), vec![0; PAGE]);
        guest.write(1, 5).join();
    }
}

#[test]
fn clones_of_one_private_file_do_not_see_each_others_writes() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Private, 40);
    let serving = served(&guest, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    for page in 0..40 {
        guest.write(page, 1000 + page as u64).join();
    }
    let file = guest.memory.as_ref().unwrap();
    let other =
        latepage::sys::mapping::Mapping::private(std::os::fd::AsFd::as_fd(file), 0, 40 * PAGE).unwrap();
    for page in 0..40 {
        assert_eq!(guest.touch(page).join(), 1000 + page as u64);
        assert_eq!(other.load(page * PAGE), word((page * PAGE) as u64, 0));
    }
}

#[test]
fn a_filled_page_is_never_written_again() {
    need_userfaultfd!();
    for backing in [Backing::Shared, Backing::Private] {
        let guest = Guest::new(backing, 512);
        let mut serving = served(&guest, Policy { fault_around: FaultAround::NONE, ..policy() });
        let _socket = guest.connect(&serving.socket, "vm");
        for page in 0..512 {
            guest.write(page, 9).join();
        }
        // Population over all of it, and faults on all of it: whatever comes second writes nothing.
        let session = serving.session("vm");
        serving.pager.populate(&session, std::iter::once(0..512));
        serving.pager.populate(&session, std::iter::once(0..512));
        assert!(serving.pager.wait_populated(&session, Some(vmm::BOUND)));
        assert_eq!(
            guest.verify(1, |offset| if offset % 4096 == 0 { 9 } else { word(offset, 0) }).join(),
            [0; 0]
        );
        assert_eq!(session.stats().snapshot().counters.faults, 512);
    }
}

#[test]
fn a_file_that_held_something_else_before_is_overwritten_with_the_snapshot() {
    need_userfaultfd!();
    for backing in [Backing::Shared, Backing::Private] {
        for population in [policy(), populating()] {
            let guest = Guest::new(backing, 60);
            let file = guest.memory.as_ref().unwrap();
            let other = latepage::sys::mapping::Mapping::shared(std::os::fd::AsFd::as_fd(file), 0, 60 * PAGE)
                .unwrap();
            for word in 0..60 * PAGE / 8 {
                other.store(word * 8, 0xDEAD);
            }
            let serving = served(&guest, population);
            let _socket = guest.connect(&serving.socket, "vm");
            assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0], "{backing}");
        }
    }
}

/// Sixteen pages of words, sixteen that are a hole, and so on.
struct Holed(u64);

impl Holed {
    fn word(offset: u64) -> u64 {
        if offset / PAGE as u64 % 32 < 16 { offset | 1 } else { 0 }
    }
}

impl Source for Holed {
    fn describe(&self) -> String {
        "holed".to_owned()
    }

    fn size(&self) -> u64 {
        self.0
    }

    fn ask<'a>(
        &'a self,
        offset: u64,
        length: usize,
        _: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        let stretch = 16 * PAGE;
        let length = length.min(stretch - offset as usize % stretch);
        if Self::word(offset) == 0 {
            return Ok(Answer::Zero(length as u64));
        }
        for (at, bytes) in scratch[..length].chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&Self::word(offset + at as u64 * 8).to_ne_bytes());
        }
        Ok(Answer::Bytes(&scratch[..length]))
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.ask(offset, length, unit, scratch)
    }
}

/// By touch alone, by population alone, and by touch while it populates.
#[test]
fn no_byte_of_a_file_that_is_full_is_ever_seen_neither_for_contents_nor_for_holes() {
    need_userfaultfd!();
    const PAGES: usize = 500;
    for (population, waits) in [(policy(), false), (populating(), true), (populating(), false)] {
        let guest = Guest::new(Backing::Shared, PAGES);
        let file = guest.memory.as_ref().unwrap();
        rustix::io::pwrite(file, &vec![0xEE; PAGES * PAGE], 0).unwrap();
        let mut serving = Serving::new(Arc::new(Holed(guest.layout.end())), population);
        let _socket = guest.connect(&serving.socket, "vm");
        if waits {
            serving.wait("populated", |what| matches!(what, What::Populated { failed: 0, .. }));
            assert_eq!(serving.session("vm").pages().lacking(), 0);
        }
        // Up and down, so that pages come alone and in runs.
        let view = Arc::clone(&guest.view);
        let looks = [1, 499].map(|stride| {
            let view = Arc::clone(&view);
            start(move || {
                let words = |page: usize| (page * PAGE..(page + 1) * PAGE).step_by(8);
                let wrong = |page: &usize| words(*page).any(|at| view.load(at) != Holed::word(at as u64));
                (0..PAGES).map(|turn| turn * stride % PAGES).filter(wrong).collect::<Vec<_>>()
            })
        });
        for look in looks {
            assert_eq!(look.join(), [0; 0], "waits for population: {waits}");
        }
    }
}

#[test]
fn a_page_taken_away_without_a_word_reads_zero_again() {
    need_userfaultfd!();
    let guest = Make { events: false, ..Make::new(Backing::Anonymous, 32) }.build();
    let mut serving = served(&guest, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    for page in 0..32 {
        assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0));
    }
    guest.discard(0, 16).join();
    for page in 0..16 {
        assert_eq!(guest.read(page).join(), vec![0; PAGE]);
    }
    assert_eq!(serving.session("vm").stats().snapshot().counters.removed_pages, 0);
}

#[test]
fn a_hole_punched_without_a_word_reads_zero() {
    need_userfaultfd!();
    let guest = Make { events: false, ..Make::new(Backing::Shared, 32) }.build();
    let serving = served(&guest, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    for page in 0..32 {
        guest.touch(page).join();
    }
    guest.discard(4, 8).join();
    for page in 4..12 {
        assert_eq!(guest.read(page).join(), vec![0; PAGE]);
    }
    assert_eq!(guest.touch(20).join(), word(20 * PAGE as u64, 0));
}

#[test]
fn a_write_protected_page_lets_the_write_through() {
    need_userfaultfd!();
    let guest = Make { also: RegisterMode::WP, ..Make::new(Backing::Anonymous, 16) }.build();
    let mut serving = served(&guest, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    for page in 0..16 {
        guest.touch(page).join();
        guest.uffd.write_protect(guest.address(page), PAGE as u64, true).unwrap();
        guest.write(page, 3).join();
        assert_eq!(guest.touch(page).join(), 3);
    }
    let counters = serving.session("vm").stats().snapshot().counters;
    assert_eq!((counters.write_protects, counters.failures), (16, 0));
}

#[test]
fn a_minor_fault_after_another_thread_filled_sees_what_was_filled() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Shared, 64);
    let mut serving = served(&guest, populating());
    let _socket = guest.connect(&serving.socket, "vm");
    serving.wait("populated", |what| matches!(what, What::Populated { .. }));
    // The guest's mapping goes, the file's page stays, and no event tells: MADV_DONTNEED on a second registration's terms.
    let view = Arc::clone(&guest.view);
    start(move || view.dont_need(0, 64 * PAGE).unwrap()).join();
    assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0]);
    assert!(serving.session("vm").stats().snapshot().counters.minors > 0);
}

/// A VMM may register for minor faults and yet send no memory file.
#[test]
fn a_minor_fault_without_an_install_view_is_released() {
    need_userfaultfd!();
    let mut guest = Guest::new(Backing::Shared, 32);
    let file = guest.memory.take();
    let serving = served(&guest, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    for page in 0..32 {
        assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0));
    }
    let view = Arc::clone(&guest.view);
    start(move || view.dont_need(0, 32 * PAGE).unwrap()).join();
    for page in 0..32 {
        assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0));
    }
    drop(file);
}

#[test]
fn two_regions_in_one_vm_are_told_apart() {
    need_userfaultfd!();
    // The second half of memory is named first, and lies at other offsets.
    let guest = Guest::new(Backing::Anonymous, 128);
    let half = 64 * PAGE as u64;
    let region = |gpa, hva, offset| latepage::memory::Region {
        gpa: Some(gpa),
        hva,
        size: half,
        offset,
        page_size: latepage::memory::PageSize::Small,
    };
    let start = guest.view.address();
    let layout =
        latepage::memory::Layout::new(vec![region(1 << 32, start + half, 0), region(0, start, half)])
            .unwrap();
    let guest = Guest { layout, ..guest };
    let serving = served(&guest, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    let wrong = guest.verify(5, move |at| word(if at < half { at + half } else { at - half }, 0));
    assert_eq!(wrong.join(), [0; 0]);
}

#[test]
fn a_page_installed_behind_our_back_releases_its_waiter() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 8);
    let source = Arc::new(Snapshot::new(guest.layout.end()).cold([2]));
    let mut serving =
        Serving::new(Arc::clone(&source) as _, Policy { fault_around: FaultAround::NONE, ..policy() });
    let _socket = guest.connect(&serving.socket, "vm");
    let waiter = guest.touch(2);
    source.waited_for.wait();
    // Contents first, the waiter still asleep: only the session's wake, after EEXIST, can release it.
    let mode = latepage::sys::uffd::InstallMode::DONTWAKE;
    let contents = vec![7; PAGE];
    assert_eq!(guest.uffd.copy(guest.address(2), &contents, mode).stopped, None);
    source.thaw.open();
    assert_eq!(waiter.join(), u64::from_ne_bytes([7; 8]));
    assert_eq!(serving.session("vm").stats().snapshot().counters.already_there, 1);
}

#[test]
fn a_run_with_a_page_in_its_middle_already_there_comes_whole() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 16);
    let mine = vec![7; PAGE];
    for page in [3, 4, 9] {
        let mode = latepage::sys::uffd::InstallMode::empty();
        assert_eq!(guest.uffd.copy(guest.address(page), &mine, mode).stopped, None);
    }
    let mut serving = served(&guest, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    let theirs = |page: usize| {
        if [3, 4, 9].contains(&page) { u64::from_ne_bytes([7; 8]) } else { word((page * PAGE) as u64, 0) }
    };
    guest.touch(0).join();
    let session = serving.session("vm");
    until("the whole run", || session.owed() == 0);
    for page in 0..16 {
        assert_eq!(guest.touch(page).join(), theirs(page), "page {page}");
    }
    assert_eq!(session.stats().snapshot().counters.already_there, 3);
    // One fault brought them all: those that were there stopped nothing.
    assert_eq!(session.stats().snapshot().counters.faults, 1);
}

/// The kernel refuses a whole run that leaves the mapping its first page is in (ENOENT), though that page could be had.
#[test]
fn a_run_that_leaves_the_registered_range_still_brings_the_page_asked_for() {
    need_userfaultfd!();
    for backing in SMALL {
        let guest = Guest::new(backing, 32);
        // From the sixth page on it is no longer registered: the VMM has its own plans for it. Pages 5 to 7 are no zero pages.
        guest.uffd.unregister(guest.address(6), 26 * PAGE as u64).unwrap();
        let serving = served(&guest, policy());
        let _socket = guest.connect(&serving.socket, "vm");
        for page in [5, 0, 4] {
            assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0), "{backing}");
        }
    }
}

#[test]
fn a_mapping_in_two_parts_is_populated_whole() {
    need_userfaultfd!();
    for backing in SMALL {
        let guest = Guest::new(backing, 32);
        // One part has another mode, and so another mapping in the kernel: no run may span both.
        guest
            .uffd
            .register(guest.address(6), 10 * PAGE as u64, RegisterMode::MISSING | RegisterMode::WP)
            .unwrap();
        let mut serving = served(&guest, populating());
        let _socket = guest.connect(&serving.socket, "vm");
        serving.wait("populated", |what| matches!(what, What::Populated { failed: 0, .. }));
        assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0], "{backing}");
    }
}

/// Nobody knows who waits where a range was taken out of our hands: they look again.
#[test]
fn a_fault_whose_range_was_unregistered_meanwhile_hangs_nobody() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 8);
    let source = Arc::new(Snapshot::new(guest.layout.end()).cold([2]));
    let serving = Serving::new(Arc::clone(&source) as _, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    let waiter = guest.touch(2);
    source.waited_for.wait();
    // Unregistering wakes it, and the kernel gives it a page of its own.
    guest.uffd.unregister(guest.address(0), 8 * PAGE as u64).unwrap();
    assert_eq!(waiter.join(), 0);
    source.thaw.open();
}

#[test]
fn many_threads_on_one_page_are_all_released() {
    need_userfaultfd!();
    for backing in SMALL {
        let guest = Guest::new(backing, 16);
        let source = Arc::new(Snapshot::new(guest.layout.end()).cold([5]));
        let mut serving = Serving::new(Arc::clone(&source) as _, policy());
        let _socket = guest.connect(&serving.socket, "vm");
        let waiters: Vec<_> = (0..40).map(|_| guest.touch(5)).collect();
        let session = serving.session("vm");
        until("all forty faults", || session.stats().snapshot().counters.faults >= 40);
        source.thaw.open();
        for waiter in waiters {
            assert_eq!(waiter.join(), word(5 * PAGE as u64, 0));
        }
        // One that was stopped while it waited has faulted once more.
        let counters = session.stats().snapshot().counters;
        assert!((39..counters.faults).contains(&counters.joined), "{counters:?}");
    }
}

/// Up and down, one thread and several: every page right, and far fewer faults than pages.
#[test]
fn a_guest_that_walks_is_brought_ever_longer_runs() {
    need_userfaultfd!();
    const PAGES: usize = 2048;
    for backing in SMALL {
        for threads in [1, 4] {
            let guest = Guest::new(backing, PAGES);
            let mut serving =
                served(&guest, Policy { fault_around: FaultAround::Auto, trace: 1 << 14, ..policy() });
            let _socket = guest.connect(&serving.socket, "vm");
            let session = serving.session("vm");
            let share = PAGES / threads;
            std::thread::scope(|scope| {
                for thread in 0..threads {
                    let guest = &guest;
                    scope.spawn(move || {
                        for step in 0..share {
                            // Every other thread walks down.
                            let at = if thread % 2 == 0 { step } else { share - 1 - step };
                            let page = thread * share + at;
                            assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0), "{backing}");
                        }
                    });
                }
            });
            let counters = session.stats().snapshot().counters;
            assert_eq!(session.owed(), 0);
            assert!(counters.faults < PAGES as u64 / 4, "{backing}, {threads} threads: {counters:?}");
            assert!(counters.beside_pages > PAGES as u64 / 2, "{backing}, {threads} threads: {counters:?}");
            assert!(counters.beside_touched <= counters.beside_pages, "{counters:?}");
        }
    }
}

/// What was discarded is never brought by a run that passes over it.
#[test]
fn a_run_never_brings_back_what_was_discarded() {
    need_userfaultfd!();
    for backing in [Backing::Anonymous, Backing::Shared] {
        let guest = Guest::new(backing, 512);
        let mut serving = served(&guest, Policy { fault_around: FaultAround::Auto, ..policy() });
        let _socket = guest.connect(&serving.socket, "vm");
        guest.touch(100).join();
        guest.discard(100, 1).join();
        let session = serving.session("vm");
        until("the discard", || session.stats().snapshot().counters.removed_pages == 1);
        for page in 0..512 {
            let expected = if page == 100 { 0 } else { word((page * PAGE) as u64, 0) };
            assert_eq!(guest.touch(page).join(), expected, "page {page}, {backing}");
        }
    }
}
