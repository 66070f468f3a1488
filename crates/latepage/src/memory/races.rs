//! loom: what holds when threads meet on one page, in every interleaving and under the memory model.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p latepage --lib --release loom_`.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use loom::sync::atomic::AtomicU64;
use loom::sync::{Arc, Mutex};
use loom::thread;

use super::{Claim, PageState, Pages};

/// Runs two threads on one page in every interleaving; `before` prepares it, `after` sees what both returned.
fn race<A: 'static, B: 'static>(
    before: impl Fn(&Pages) + Send + Sync + 'static,
    first: fn(&Pages) -> A,
    second: fn(&Pages) -> B,
    after: impl Fn(A, B, PageState) + Send + Sync + 'static,
) {
    loom::model(move || {
        let pages = Arc::new(Pages::new(1));
        before(&pages);
        let shared = Arc::clone(&pages);
        let other = thread::spawn(move || first(&shared));
        let second = second(&pages);
        let first = other.join().unwrap();
        after(first, second, pages.state(0));
    });
}

fn claimed(pages: &Pages) {
    assert_eq!(pages.claim(0), Claim::Fill);
}

fn removed(pages: &Pages) {
    pages.remove(0);
}

fn clearing(pages: &Pages) {
    pages.remove(0);
    assert_eq!(pages.claim(0), Claim::Clear);
}

#[test]
fn loom_of_two_faults_exactly_one_brings_the_page() {
    race(
        |_| (),
        |pages| pages.claim(0),
        |pages| pages.claim(0),
        |first, second, state| {
            let mut claims = [first, second];
            claims.sort_by_key(|claim| *claim != Claim::Fill);
            assert_eq!(claims, [Claim::Fill, Claim::Wait]);
            assert_eq!(state, PageState::InFlight);
        },
    );
}

#[test]
fn loom_of_a_fault_and_population_exactly_one_brings_the_page() {
    race(
        |_| (),
        |pages| pages.claim(0),
        |pages| pages.claim_absent(0),
        |fault, population, _| assert_eq!(fault == Claim::Fill, !population),
    );
}

#[test]
fn loom_of_two_faults_exactly_one_clears_a_removed_page() {
    race(
        removed,
        |pages| pages.claim(0),
        |pages| pages.claim(0),
        |first, second, state| {
            assert_eq!([first, second].iter().filter(|claim| **claim == Claim::Clear).count(), 1);
            assert_eq!(state, PageState::Clearing);
        },
    );
}

#[test]
fn loom_a_claim_and_a_removal_never_leave_the_snapshot_behind() {
    race(
        |_| (),
        |pages| pages.claim(0),
        |pages| pages.remove(0),
        |claim, found, state| match (claim, found) {
            (Claim::Fill, PageState::InFlight) => assert_eq!(state, PageState::Removed),
            (Claim::Clear, PageState::Absent) => assert_eq!(state, PageState::Clearing),
            other => panic!("{other:?} ended {state}"),
        },
    );
}

#[test]
fn loom_a_page_removed_while_it_is_brought_does_not_settle() {
    for before in [claimed as fn(&Pages), clearing] {
        race(
            before,
            |pages| pages.settle(0),
            |pages| pages.remove(0),
            |settled, found, state| {
                assert_eq!(settled, found == PageState::Present);
                assert_eq!(state, PageState::Removed);
            },
        );
    }
}

#[test]
fn loom_a_page_removed_while_it_is_filled_is_not_filled() {
    race(
        claimed,
        |pages| pages.filled(0),
        |pages| pages.remove(0),
        |filled, found, state| {
            assert_eq!(filled, found == PageState::Filled);
            assert_eq!(state, PageState::Removed);
        },
    );
}

#[test]
fn loom_an_abandoned_page_is_not_the_sources_again_once_removed() {
    race(
        claimed,
        |pages| pages.abandon(0),
        |pages| pages.remove(0),
        |abandoned, found, state| {
            assert_eq!(abandoned, found == PageState::Absent);
            assert_eq!(state, PageState::Removed);
        },
    );
}

#[test]
fn loom_a_page_that_is_given_back_has_one_owner_or_none() {
    race(
        claimed,
        |pages| pages.abandon(0),
        |pages| pages.claim(0),
        |abandoned, claim, state| {
            assert!(abandoned);
            match claim {
                Claim::Fill => assert_eq!(state, PageState::InFlight),
                Claim::Wait => assert_eq!(state, PageState::Absent),
                other => panic!("{other:?}"),
            }
        },
    );
}

#[test]
fn loom_a_page_settles_or_fails_but_not_both() {
    race(
        claimed,
        |pages| pages.settle(0),
        |pages| pages.fail(0),
        |settled, found, state| {
            assert_eq!(settled, found == PageState::Present);
            let expected = [PageState::Failed, PageState::Present][usize::from(settled)];
            assert_eq!(state, expected);
        },
    );
}

#[test]
fn loom_who_finds_a_page_filled_sees_its_contents() {
    loom::model(|| {
        let pages = Arc::new(Pages::new(1));
        let contents = Arc::new(AtomicU64::new(0));
        claimed(&pages);
        let (shared, words) = (Arc::clone(&pages), Arc::clone(&contents));
        let filler = thread::spawn(move || {
            words.store(0x5eed, Relaxed);
            assert!(shared.filled(0));
        });
        match pages.claim(0) {
            Claim::Expose => assert_eq!(contents.load(Relaxed), 0x5eed),
            claim => assert_eq!(claim, Claim::Wait),
        }
        filler.join().unwrap();
    });
}

/// What the guest's mapping holds at one page.
const MISSING: u64 = 0;
const SNAPSHOT: u64 = 1;
const ZERO: u64 = 2;

/// A session of one page: its state, the gate, and the guest's mapping, into which an install goes only where nothing is.
struct Session {
    pages: Pages,
    gate: Mutex<()>,
    mapping: AtomicU64,
}

impl Session {
    /// Installs for a claim that was taken outside the gate, if the page is still in the state that the claim left it in.
    fn install(&self, claimed: PageState, contents: u64) {
        let _gate = self.gate.lock().unwrap();
        if self.pages.state(0) == claimed {
            let _there = self.mapping.compare_exchange(MISSING, contents, SeqCst, SeqCst);
            assert!(self.pages.settle(0));
        }
    }

    /// A fault, served as a session serves it.
    fn touch(&self) {
        match self.pages.claim(0) {
            Claim::Fill => self.install(PageState::InFlight, SNAPSHOT),
            Claim::Clear => self.install(PageState::Clearing, ZERO),
            // Either it is there, or a discard has taken it away since: then it is zero.
            Claim::Present => {
                let _there = self.mapping.compare_exchange(MISSING, ZERO, SeqCst, SeqCst);
            }
            Claim::Wait => (),
            claim => panic!("{claim:?}"),
        }
    }
}

#[test]
fn loom_what_is_installed_in_the_gate_is_never_the_snapshot_after_a_removal() {
    loom::model(|| {
        let session = Arc::new(Session {
            pages: Pages::new(1),
            gate: Mutex::new(()),
            mapping: AtomicU64::new(MISSING),
        });
        let bringing = Arc::clone(&session);
        let bringer = thread::spawn(move || {
            if bringing.pages.claim_absent(0) {
                bringing.install(PageState::InFlight, SNAPSHOT);
            }
        });
        let discarding = Arc::clone(&session);
        let discarder = thread::spawn(move || {
            {
                let _gate = discarding.gate.lock().unwrap();
                discarding.pages.remove(0);
            }
            // The event has been read; only now does the kernel take the page away, and nobody knows when.
            discarding.mapping.store(MISSING, SeqCst);
        });
        session.touch();
        bringer.join().unwrap();
        discarder.join().unwrap();
        assert_ne!(session.mapping.load(SeqCst), SNAPSHOT);
        session.touch();
        assert_eq!(session.mapping.load(SeqCst), ZERO);
    });
}
