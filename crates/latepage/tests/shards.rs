//! A VM with several userfaultfds, each over a shard of its memory: contents, discards that span shards, and every way to its end.

mod vmm;

use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use latepage::attachment::{Backing, shards};
use latepage::memory::{PageState, Shards};
use latepage::pager::{Config, What};
use latepage::session::{FaultAround, OnMissing, Policy, Population};
use latepage::source::{Answer, Source, SourceError};
use latepage::sys::fdpass;
use latepage::sys::uffd::{Features, RegisterMode};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmm::child::{Holdings, Vmm, alone};
use vmm::guest::{Guest, Make};
use vmm::serving::{Serving, policy, populating};
use vmm::snapshot::{Snapshot, word};
use vmm::{Latch, PAGE, start};

const SMALL: [Backing; 3] = [Backing::Anonymous, Backing::Private, Backing::Shared];

fn guest(backing: Backing, pages: usize, shards: usize) -> Guest {
    Make { shards, ..Make::new(backing, pages) }.build()
}

/// A pager of so many workers, of which each has some of the shards.
fn serving(workers: usize, pages: usize, policy: Policy) -> Serving {
    with_source(workers, Arc::new(Snapshot::new((pages * PAGE) as u64)), policy)
}

fn with_source(workers: usize, source: Arc<dyn Source>, policy: Policy) -> Serving {
    Serving::with(Config { workers: Some(workers), ..Config::default() }, source, policy)
}

/// Does nothing unless this process was started as a VMM.
#[test]
fn vmm_process() {
    vmm::child::obey();
}

#[test]
fn many_threads_over_many_shards_read_the_snapshot_and_no_page_comes_twice() {
    need_userfaultfd!();
    const PAGES: usize = 1003;
    for backing in SMALL {
        for (shards, workers, population) in
            [(2, 1, policy()), (7, 2, policy()), (7, 3, populating()), (64, 4, populating())]
        {
            let guest = guest(backing, PAGES, shards);
            let mut serving = serving(workers, PAGES, population);
            let _socket = guest.connect(&serving.socket, "vm");
            let strides = [1, 2, 5, 7, 11, 13, 333, 611];
            let threads: Vec<_> =
                strides.into_iter().map(|stride| guest.verify(stride, |offset| word(offset, 0))).collect();
            for thread in threads {
                assert_eq!(thread.join(), [0; 0], "{backing}, {shards} shards on {workers} workers");
            }
            let session = serving.session("vm");
            // Whoever brought the last page may still be counting it.
            serving.pager.close();
            assert_eq!((session.shards(), session.owed()), (shards, 0));
            let counters = session.stats().snapshot().counters;
            let what = format!("{backing}, {shards} shards on {workers} workers: {counters:?}");
            assert_eq!(counters.bytes_installed, (PAGES * PAGE) as u64, "{what}");
            assert_eq!((counters.already_there, counters.failures), (0, 0), "{what}");
        }
    }
}

/// Two shards whose first pages are each brought only after the other one's is asked for.
struct Meeting {
    snapshot: Snapshot,
    asked: [Latch; 2],
}

impl Source for Meeting {
    fn describe(&self) -> String {
        "meeting".to_owned()
    }

    fn size(&self) -> u64 {
        self.snapshot.size()
    }

    fn ask<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        let shard = usize::from(offset >= self.size() / 2);
        self.asked[shard].open();
        self.asked[1 - shard].wait();
        self.snapshot.ask(offset, length, unit, scratch)
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.snapshot.wait(offset, length, unit, scratch)
    }
}

#[test]
fn shards_of_one_vm_are_served_at_the_same_time_by_different_workers() {
    need_userfaultfd!();
    let guest = guest(Backing::Anonymous, 32, 2);
    let snapshot = Snapshot::new(32 * PAGE as u64);
    let serving = with_source(2, Arc::new(Meeting { snapshot, asked: Default::default() }), policy());
    let _socket = guest.connect(&serving.socket, "vm");
    let (first, second) = (guest.touch(1), guest.touch(17));
    assert_eq!(first.join(), word(PAGE as u64, 0));
    assert_eq!(second.join(), word(17 * PAGE as u64, 0));
}

#[test]
fn what_comes_beside_a_fault_ends_with_its_shard() {
    need_userfaultfd!();
    let there = |states: &dyn Fn(u32) -> PageState| -> Vec<u32> {
        (0..64).filter(|page| states(*page) == PageState::Present).collect()
    };
    let around = [FaultAround::Window(64 << 10), FaultAround::Auto];
    for (fault_around, touched, came) in [
        (around[0], vec![17], 17..21),
        (around[1], (12..20).collect(), 12..21),
        (around[1], vec![21], 21..22),
    ] {
        // Shards end behind pages 20 and 41.
        let guest = guest(Backing::Shared, 64, 3);
        assert_eq!(guest.shards.pages(1), 21..42);
        let mut serving = serving(2, 64, Policy { fault_around, ..policy() });
        let _socket = guest.connect(&serving.socket, "vm");
        for page in touched {
            assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0));
        }
        let session = serving.session("vm");
        vmm::until("what comes behind", || {
            there(&|page| session.pages().state(page)) == came.clone().collect::<Vec<_>>()
        });
    }
}

#[test]
fn a_cold_page_is_read_no_further_than_its_shard() {
    need_userfaultfd!();
    let guest = guest(Backing::Anonymous, 64, 3);
    let source = Arc::new(Snapshot::new(64 * PAGE as u64).cold(0..64));
    let mut serving = with_source(2, Arc::clone(&source) as _, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    let touches = [18, 21, 41].map(|page| (page, guest.touch(page)));
    source.waited_for.wait();
    source.thaw.open();
    for (page, touch) in touches {
        assert_eq!(touch.join(), word((page * PAGE) as u64, 0));
    }
    let session = serving.session("vm");
    let states = || [20, 31, 41, 42].map(|page| session.pages().state(page) == PageState::Present);
    vmm::until("what comes beside", || states() == [true, true, true, false]);
    let wanted = |page| session.wanted(page).length / PAGE;
    assert_eq!([18, 21, 41].map(wanted), [3, 11, 1]);
}

#[test]
fn a_discard_that_spans_shards_is_zero_in_all_of_them() {
    need_userfaultfd!();
    for backing in SMALL {
        for population in [policy(), populating()] {
            let guest = guest(backing, 300, 8);
            let mut serving = serving(2, 300, population);
            let _socket = guest.connect(&serving.socket, "vm");
            for page in 0..50 {
                assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0));
            }
            for round in 0..3 {
                // From the middle of the first shard to the middle of the sixth.
                guest.discard(20, 190).join();
                for page in (20..210).step_by(3) {
                    assert_eq!(guest.read(page).join(), vec![0; PAGE], "{backing} round {round} page {page}");
                }
            }
            for page in (0..20).chain(210..300) {
                assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0), "{backing}");
            }
            assert!(serving.session("vm").stats().snapshot().counters.removed_pages >= 190);
        }
    }
}

#[test]
fn a_storm_of_discards_across_shards_beside_population_never_brings_a_page_back() {
    need_userfaultfd!();
    const PAGES: usize = 1200;
    for backing in SMALL {
        let guest = guest(backing, PAGES, 16);
        let mut serving = serving(2, PAGES, populating());
        let discarded: Arc<Vec<AtomicU32>> = Arc::new((0..PAGES).map(|_| AtomicU32::new(0)).collect());
        let over = Arc::new(AtomicBool::new(false));
        let readers: Vec<_> = (0..3usize)
            .map(|number| {
                let (view, discarded, over) =
                    (Arc::clone(&guest.view), Arc::clone(&discarded), Arc::clone(&over));
                start(move || {
                    let mut wrong = Vec::new();
                    for turn in 0.. {
                        if over.load(Ordering::Acquire) {
                            break;
                        }
                        let page = (turn * 7 + number * 400) % PAGES;
                        let gone = discarded[page].load(Ordering::Acquire) > 0;
                        let found = view.load(page * PAGE + 8);
                        if found != 0 && (gone || found != word((page * PAGE + 8) as u64, 0)) {
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
                for turn in 0..1500 {
                    // Longer than a shard is.
                    let (page, pages) = (turn * 11 % (PAGES - 90), 1 + turn % 90);
                    let (at, length) = (page * PAGE, pages * PAGE);
                    let shared = backing == Backing::Shared;
                    if shared { view.remove(at, length) } else { view.dont_need(at, length) }.unwrap();
                    for gone in &discarded[page..page + pages] {
                        gone.fetch_add(1, Ordering::AcqRel);
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
fn a_full_vm_is_let_go_shard_by_shard_and_its_next_discard_waits_for_nobody() {
    need_userfaultfd!();
    for backing in [Backing::Anonymous, Backing::Shared] {
        let guest = guest(backing, 100, 5);
        let mut serving = serving(2, 100, populating());
        let _socket = guest.connect(&serving.socket, "vm");
        serving.wait("populated", |what| matches!(what, What::Populated { .. }));
        serving.pager.drain();
        assert_eq!(serving.ended("vm"), "detached");
        guest.discard(0, 100).join();
        assert_eq!(guest.verify(1, |_| 0).join(), [0; 0]);
    }
}

#[test]
fn a_discard_that_meets_the_letting_go_never_hangs() {
    need_userfaultfd!();
    for round in 0..40 {
        let guest = guest(if round % 2 == 0 { Backing::Anonymous } else { Backing::Shared }, 12, 3);
        let mut serving = serving(2, 12, populating());
        let _socket = guest.connect(&serving.socket, "vm");
        serving.wait("populated", |what| matches!(what, What::Populated { .. }));
        let over = Arc::new(AtomicBool::new(false));
        let balloon = {
            let (view, over, shared) =
                (Arc::clone(&guest.view), Arc::clone(&over), guest.backing == Backing::Shared);
            start(move || {
                while !over.load(Ordering::Acquire) {
                    // Of the first two shards.
                    let (at, length) = (2 * PAGE, 4 * PAGE);
                    if shared { view.remove(at, length) } else { view.dont_need(at, length) }.unwrap();
                }
            })
        };
        let session = serving.session("vm");
        vmm::until("discards under way", || session.stats().snapshot().counters.removed_pages > 1);
        serving.pager.drain();
        assert_eq!(serving.ended("vm"), "detached");
        over.store(true, Ordering::Release);
        balloon.join();
    }
}

#[test]
fn closing_the_pager_poisons_what_every_shard_lacks() {
    need_userfaultfd!();
    let guest = guest(Backing::Anonymous, 30, 3);
    let mut serving = serving(2, 30, Policy { fault_around: FaultAround::NONE, ..policy() });
    let _socket = guest.connect(&serving.socket, "vm");
    for page in [0, 14, 29] {
        guest.touch(page).join();
    }
    let session = serving.session("vm");
    assert_eq!(serving.pager.close(), ["vm"]);
    let state = |page| session.pages().state(page);
    let lacked = (0..30).filter(|page| ![0, 14, 29].contains(page));
    assert_eq!(lacked.filter(|page| state(*page) == PageState::Failed).count(), 27);
    assert_eq!([0, 14, 29].map(state), [PageState::Present; 3]);
}

#[test]
fn a_killed_vm_leaves_nothing_with_any_worker() {
    need_userfaultfd!();
    alone("a_killed_vm_leaves_nothing_with_any_worker", || {
        let mut serving = serving(3, 64, policy());
        let before = Holdings::now();
        for round in 0..6 {
            let mut vm = Vmm::start();
            // One worker has no shard of the first ones.
            vm.tell(&format!("guest {} 64 {}", SMALL[round % 3], 2 + round));
            let name = format!("vm{round}");
            vm.tell(&format!("connect {} {name}", serving.socket.display()));
            assert_eq!(vm.tell("touch 63"), word(63 * PAGE as u64, 0).to_string());
            vm.tell("storm 4");
            vm.kill();
            assert_eq!(serving.ended(&name), "gone");
            drop(vm);
            vmm::until("nothing is left", || Holdings::now() == before);
        }
    });
}

#[test]
fn a_vm_whose_page_cannot_be_had_is_killed_by_whichever_shard() {
    need_userfaultfd!();
    for page in [3, 40, 63] {
        let source = Arc::new(Snapshot::new(64 * PAGE as u64).broken([page]));
        let mut serving = with_source(2, source, Policy::default());
        let mut vm = Vmm::start();
        vm.tell("guest anonymous 64 4");
        vm.tell(&format!("connect {} vm", serving.socket.display()));
        vm.say(&format!("touch {page}"));
        assert_eq!(vm.ended_by(), Some(9));
        serving.ever(
            "failed",
            |what| matches!(what, What::Failed { page: Some(at), .. } if u64::from(*at) == page),
        );
        assert_eq!(serving.ended("vm"), "gone");
    }
}

#[test]
fn a_vm_that_sends_one_userfaultfd_too_few_is_killed_and_the_others_are_held_until_it_is_dead() {
    need_userfaultfd!();
    let mut serving = serving(2, 64, Policy::default());
    let mut vm = Vmm::start();
    vm.tell("guest anonymous 64 4");
    vm.tell(&format!("connect-short {} vm", serving.socket.display()));
    vm.tell("hang-up");
    let (reason, action) = serving.refused();
    assert_eq!(reason, "latepage handshake with 3 descriptors; it needs 4");
    assert_eq!(action, "killed");
    assert_eq!(vm.ended_by(), Some(9));
}

#[test]
fn a_vm_whose_userfaultfds_are_not_over_the_shards_that_it_named_is_killed_in_words() {
    need_userfaultfd!();
    for touch in ["touch 5", "discard 5 1"] {
        let mut serving = serving(2, 64, Policy::default());
        let mut vm = Vmm::start();
        vm.tell("guest anonymous 64 4");
        vm.tell(&format!("connect-turned {} vm", serving.socket.display()));
        vm.say(touch);
        assert_eq!(vm.ended_by(), Some(9), "{touch}");
        let failed = serving.ever("failed", |what| matches!(what, What::Failed { page: None, .. }));
        let What::Failed { reason, .. } = failed else { unreachable!() };
        assert_eq!(reason, "its userfaultfd was announced for another shard of the memory");
        assert_eq!(serving.ended("vm"), "gone");
    }
}

#[test]
fn a_userfaultfd_that_was_never_set_up_takes_no_good_one_with_it() {
    need_userfaultfd!();
    for (on_missing, action, signal) in [(OnMissing::Kill, "killed", 9), (OnMissing::Poison, "poisoned", 7)] {
        let mut serving = serving(2, 64, Policy { on_missing, ..Policy::default() });
        let mut vm = Vmm::start();
        vm.tell("guest anonymous 64 2");
        vm.say(&format!("connect-unset {} vm", serving.socket.display()));
        let (reason, done) = serving.refused();
        assert!(reason.starts_with("descriptor 0 is a userfaultfd that was never set up"), "{reason}");
        assert_eq!(done, action);
        if on_missing == OnMissing::Poison {
            // Of the second shard, over which there is a good one.
            assert_eq!(vm.hear(), "ok");
            vm.say("touch 40");
        }
        assert_eq!(vm.ended_by(), Some(signal));
    }
}

#[test]
fn a_userfaultfd_of_a_dead_process_is_not_taken_for_the_end_of_the_vm() {
    need_userfaultfd!();
    for on_missing in [OnMissing::Kill, OnMissing::Poison] {
        let population = Population::Background;
        let mut serving = serving(2, 64, Policy { on_missing, population, ..Policy::default() });
        let path = serving.directory.file("lender");
        let lender = UnixListener::bind(&path).unwrap();
        let mut helper = Vmm::start();
        helper.tell("guest anonymous 64");
        helper.tell(&format!("send {} borrow", path.display()));
        let borrowed = vmm::received(&lender.accept().unwrap().0);
        helper.kill();
        assert_eq!(helper.ended_by(), Some(9));
        let mut vm = Vmm::start();
        vm.tell("guest anonymous 64 2");
        vm.say(&format!("connect-borrowed {} vm {}", serving.socket.display(), path.display()));
        let (stream, _) = lender.accept().unwrap();
        fdpass::send(&stream, b"x", &[borrowed.as_fd()]).unwrap();
        // Population meets it: nothing can be installed by it, poison neither.
        assert_eq!(vm.ended_by(), Some(9), "{on_missing:?}");
        let failed = serving.ever("failed", |what| matches!(what, What::Failed { page: None, .. }));
        let What::Failed { reason, action, .. } = failed else { unreachable!() };
        assert_eq!(reason, "the memory behind its userfaultfd is gone, and behind another one's it is not");
        assert_eq!(action, "killed");
        assert_eq!(serving.ended("vm"), "gone");
        let told = serving.so_far().iter().filter(|what| matches!(what, What::Failed { .. })).count();
        assert_eq!(told, 1);
    }
}

#[test]
fn a_vmm_without_room_for_its_userfaultfds_is_told_how_many_descriptors_it_may_have() {
    need_userfaultfd!();
    alone("a_vmm_without_room_for_its_userfaultfds_is_told_how_many_descriptors_it_may_have", || {
        let guest = guest(Backing::Anonymous, 64, 1);
        let before = Holdings::now();
        let limit = Rlimit { current: Some(40), ..getrlimit(Resource::Nofile) };
        setrlimit(Resource::Nofile, limit).unwrap();
        let divided = Shards::equal(&guest.layout, 64).unwrap();
        let error =
            shards::create(&guest.layout, &divided, Features::empty(), RegisterMode::MISSING).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no room for another userfaultfd: this process may have 40 descriptors, and has them; allow it more: ulimit -n \
             (systemd: LimitNOFILE=)"
        );
        assert_eq!(Holdings::now(), before);
    });
}

#[test]
fn the_trace_of_a_vm_has_what_came_in_every_shard() {
    need_userfaultfd!();
    let guest = guest(Backing::Anonymous, 60, 6);
    let policy = Policy { fault_around: FaultAround::NONE, trace: 4096, ..policy() };
    let mut serving = serving(3, 60, policy);
    let _socket = guest.connect(&serving.socket, "vm");
    let threads: Vec<_> =
        [1, 7, 11, 13].into_iter().map(|stride| guest.verify(stride, |offset| word(offset, 0))).collect();
    threads.into_iter().for_each(|thread| assert_eq!(thread.join(), [0; 0]));
    let session = serving.session("vm");
    // Whoever brought the last page may still be writing it down.
    serving.pager.close();
    let read = session.stats().trace.read_from(0);
    let mut seen: Vec<u32> = Vec::new();
    for entry in read.entries {
        let Range { start, end } = entry.page..entry.page + entry.pages;
        assert!(end <= 60, "{entry:?}");
        seen.extend(start..end);
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, (0..60).collect::<Vec<_>>());
}
