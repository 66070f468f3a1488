//! Sources that answer at once, zero, later, or with an error; and what that must not do to anybody else.

mod vmm;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use latepage::attachment::Backing;
use latepage::pager::{Config, What};
use latepage::session::{FaultAround, OnMissing, Policy, Population};
use vmm::child::Vmm;
use vmm::guest::Guest;
use vmm::serving::{Serving, policy, populating};
use vmm::snapshot::{Snapshot, word};
use vmm::{PAGE, until};

const SIGKILL: i32 = 9;
const SIGBUS: i32 = 7;

/// Not a test of its own: the process that plays a VMM in others.
#[test]
fn vmm_process() {
    vmm::child::obey();
}

#[test]
fn a_cold_page_delays_no_other_page_of_its_vm() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 256);
    let source = Arc::new(Snapshot::new(guest.layout.end()).cold([100]));
    let serving = Serving::new(Arc::clone(&source) as _, policy());
    let _socket = guest.connect(&serving.socket, "vm");
    let cold = guest.touch(100);
    source.waited_for.wait();
    for page in (0..256).filter(|page| *page != 100) {
        assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0));
    }
    assert!(cold.still_runs());
    source.thaw.open();
    assert_eq!(cold.join(), word(100 * PAGE as u64, 0));
}

#[test]
fn a_cold_page_of_one_vm_delays_no_fault_of_another() {
    need_userfaultfd!();
    let (slow, fast) = (Guest::new(Backing::Shared, 64), Guest::new(Backing::Anonymous, 64));
    let cold = Arc::new(Snapshot::new(slow.layout.end()).cold(0..64));
    let config = Config { workers: Some(1), readers: Some(1), ..Config::default() };
    let serving = Serving::with(config, Arc::clone(&cold) as _, policy());
    let hot = serving.also("hot", Arc::new(Snapshot::salted(fast.layout.end(), 9)), policy());
    let _slow = slow.connect(&serving.socket, "slow");
    let waiters: Vec<_> = (0..20).map(|page| slow.touch(page * 3)).collect();
    cold.waited_for.wait();
    let _fast = fast.connect(&hot, "fast");
    assert_eq!(fast.verify(7, |offset| word(offset, 9)).join(), [0; 0]);
    assert!(waiters.iter().all(vmm::Running::still_runs));
    cold.thaw.open();
    for (at, waiter) in waiters.into_iter().enumerate() {
        assert_eq!(waiter.join(), word((at * 3 * PAGE) as u64, 0));
    }
}

#[test]
fn population_that_waits_for_its_source_delays_no_fault() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 256);
    let source = Arc::new(Snapshot::new(guest.layout.end()).cold([0]));
    let mut serving = Serving::new(Arc::clone(&source) as _, populating());
    let _socket = guest.connect(&serving.socket, "vm");
    source.waited_for.wait();
    for page in 1..256 {
        assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0));
    }
    source.thaw.open();
    serving.wait("populated", |what| matches!(what, What::Populated { failed: 0, .. }));
    assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0]);
}

#[test]
fn a_cold_page_discarded_while_it_is_read_is_zero() {
    need_userfaultfd!();
    for backing in [Backing::Anonymous, Backing::Private, Backing::Shared] {
        let guest = Guest::new(backing, 32);
        let source = Arc::new(Snapshot::new(guest.layout.end()).cold([1]));
        let mut serving = Serving::new(Arc::clone(&source) as _, policy());
        let _socket = guest.connect(&serving.socket, "vm");
        let waiter = guest.touch(1);
        source.waited_for.wait();
        guest.discard(1, 1).join();
        until("the removal", || serving.session("vm").stats().snapshot().counters.removed_pages == 1);
        // A second one need not wait for the read.
        assert_eq!(guest.touch(1).join(), 0, "{backing}");
        source.thaw.open();
        assert_eq!(waiter.join(), 0, "{backing}");
        assert_eq!(guest.read(1).join(), vec![0; PAGE]);
    }
}

#[test]
fn a_zero_page_moves_no_bytes() {
    need_userfaultfd!();
    // Page 4 is a hole, page 3 is zero in words: neither is copied.
    let guest = Guest::new(Backing::Anonymous, 8);
    let mut serving = Serving::new(
        Arc::new(Snapshot::new(guest.layout.end())),
        Policy { fault_around: FaultAround::NONE, ..policy() },
    );
    let _socket = guest.connect(&serving.socket, "vm");
    for page in [3, 4] {
        assert_eq!(guest.read(page).join(), vec![0; PAGE]);
    }
    let session = serving.session("vm");
    // A guest goes on before its page is counted.
    until("both to be counted", || session.stats().snapshot().counters.zero_pages == 2);
    assert_eq!(session.stats().snapshot().counters.source_pages, 0);
}

#[test]
fn an_error_on_a_page_that_is_asked_for_kills_the_vm() {
    need_userfaultfd!();
    for cold in [false, true] {
        let mut vm = Vmm::start();
        vm.tell("guest anonymous 64");
        let source = Snapshot::new(64 * PAGE as u64).broken([7]);
        // Found out at once, or by an I/O thread.
        let source = Arc::new(if cold { source.cold([6]) } else { source });
        source.thaw.open();
        let mut serving = Serving::new(
            Arc::clone(&source) as _,
            Policy { fault_around: FaultAround::NONE, ..Policy::default() },
        );
        vm.tell(&format!("connect {} vm", serving.socket.display()));
        assert_eq!(vm.tell("touch 6"), word(6 * PAGE as u64, 0).to_string());
        vm.say("touch 7");
        assert_eq!(vm.ended_by(), Some(SIGKILL));
        let failed = serving.ever("failed", |what| matches!(what, What::Failed { .. }));
        assert!(matches!(failed, What::Failed { page: Some(7), action, .. } if action == "killed"));
        assert_eq!(serving.ended("vm"), "gone");
    }
}

#[test]
fn a_poisoned_page_is_never_a_zero_page() {
    need_userfaultfd!();
    let mut vm = Vmm::start();
    vm.tell("guest anonymous 64");
    let poison =
        Policy { on_missing: OnMissing::Poison, fault_around: FaultAround::NONE, ..Policy::default() };
    let mut serving = Serving::new(Arc::new(Snapshot::new(64 * PAGE as u64).broken([7])), poison);
    vm.tell(&format!("connect {} vm", serving.socket.display()));
    assert_eq!(vm.tell("touch 6"), word(6 * PAGE as u64, 0).to_string());
    vm.say("touch 7");
    // This VMM does not handle SIGBUS, so it is its end.
    assert_eq!(vm.ended_by(), Some(SIGBUS));
    let failed = serving.ever("failed", |what| matches!(what, What::Failed { .. }));
    assert!(matches!(failed, What::Failed { page: Some(7), action, .. } if action == "poisoned"));
    assert_eq!(serving.ended("vm"), "gone");
}

#[test]
fn an_error_that_only_population_meets_kills_nobody() {
    need_userfaultfd!();
    let mut vm = Vmm::start();
    vm.tell("guest anonymous 64");
    let killing =
        Policy { population: Population::Background, fault_around: FaultAround::NONE, ..Policy::default() };
    let mut serving = Serving::new(Arc::new(Snapshot::new(64 * PAGE as u64).broken([0])), killing);
    vm.tell(&format!("connect {} vm", serving.socket.display()));
    serving.wait("population-stopped", |what| matches!(what, What::PopulationStopped { .. }));
    for page in 1..64 {
        assert_eq!(vm.tell(&format!("touch {page}")), word((page * PAGE) as u64, 0).to_string());
    }
}

#[test]
fn a_broken_page_beside_the_one_asked_for_harms_nobody() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 16);
    let mut serving = Serving::new(Arc::new(Snapshot::new(guest.layout.end()).broken([5])), policy());
    let _socket = guest.connect(&serving.socket, "vm");
    for page in (0..16).filter(|page| *page != 5) {
        assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0));
    }
    let session = serving.session("vm");
    until("all but one", || session.owed() == 1);
    assert_eq!(session.stats().snapshot().counters.failures, 0);
}

/// Let go, it would read zero: that page is nobody's to give away.
#[test]
fn a_vm_with_a_page_that_failed_and_could_not_be_killed_is_not_let_go() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 64);
    let source = Arc::new(Snapshot::new(guest.layout.end()).broken([7]));
    // A VM in the pager's own process is not killed.
    let policy = Policy { detach_when_full: true, fault_around: FaultAround::NONE, ..Policy::default() };
    let mut serving = Serving::new(source, policy);
    let _socket = guest.connect(&serving.socket, "vm");
    let waiter = guest.touch(7);
    serving.wait("failed", |what| matches!(what, What::Failed { page: Some(7), .. }));
    for page in (0..64).filter(|page| *page != 7) {
        assert_eq!(guest.touch(page).join(), word((page * PAGE) as u64, 0));
    }
    serving.ever("populated", |what| matches!(what, What::Populated { failed: 1, .. }));
    serving.pager.drain();
    serving.wait("draining", |what| matches!(what, What::Draining { .. }));
    // It still waits, and a fault after this one is still ours to hold: only what we put there by hand is seen.
    let contents = vec![7; PAGE];
    let put = guest.uffd.copy(guest.address(7), &contents, latepage::sys::uffd::InstallMode::empty());
    assert_eq!(put.stopped, None, "the range is no longer registered");
    assert_eq!(waiter.join(), u64::from_ne_bytes([7; 8]));
    serving.abandon();
}

#[test]
fn a_fault_that_waits_too_long_is_reported_once() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 32);
    let source = Arc::new(Snapshot::new(guest.layout.end()).cold([3, 9]));
    let mut serving = Serving::new(
        Arc::clone(&source) as _,
        Policy { stall_warning: Duration::from_millis(200), ..policy() },
    );
    let _socket = guest.connect(&serving.socket, "vm");
    let waiters = [guest.touch(3), guest.touch(9)];
    let mut addresses: Vec<u64> = (0..2)
        .map(|_| match serving.wait("stall", |what| matches!(what, What::Stall { .. })) {
            What::Stall { vm, address, age } => {
                assert!(vm == "vm" && age >= 0.2);
                address
            }
            _ => unreachable!(),
        })
        .collect();
    addresses.sort_unstable();
    assert_eq!(addresses, [guest.address(3), guest.address(9)]);
    // A third one comes later; by then the first two have been looked at again many times.
    let late = guest.touch(3 + 16);
    assert_eq!(late.join(), word(19 * PAGE as u64, 0));
    source.thaw.open();
    for waiter in waiters {
        waiter.join();
    }
    let session = serving.session("vm");
    assert_eq!(session.stats().snapshot().counters.stalls, 2);
}

#[test]
fn a_source_that_answers_less_than_a_page_fails_closed_and_harms_no_other_vm() {
    need_userfaultfd!();
    let mut vm = Vmm::start();
    vm.tell("guest anonymous 64");
    let lying = Arc::new(Snapshot::new(64 * PAGE as u64).lying());
    let mut serving = Serving::new(Arc::clone(&lying) as _, Policy::default());
    vm.tell(&format!("connect {} lied-to", serving.socket.display()));
    vm.say("touch 5");
    assert_eq!(vm.ended_by(), Some(SIGKILL));
    serving.ever("failed", |what| matches!(what, What::Failed { page: Some(5), .. }));
    let guest = Guest::new(Backing::Anonymous, 64);
    let sound = serving.also("sound", Arc::new(Snapshot::new(guest.layout.end())), policy());
    let _socket = guest.connect(&sound, "vm");
    assert_eq!(guest.verify(1, |offset| word(offset, 0)).join(), [0; 0]);
    assert!(lying.asked.load(Ordering::SeqCst) > 0);
}

#[test]
fn population_from_a_source_that_answers_less_than_a_page_stops() {
    need_userfaultfd!();
    let guest = Guest::new(Backing::Anonymous, 64);
    let lying = Arc::new(Snapshot::new(guest.layout.end()).lying());
    let mut serving = Serving::new(lying, populating());
    let _socket = guest.connect(&serving.socket, "vm");
    serving.wait("population-stopped", |what| matches!(what, What::PopulationStopped { .. }));
    serving.abandon();
}
