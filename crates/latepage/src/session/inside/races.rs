//! loom: threads resolve their own faults at once, in the order of this module, and memory is discarded among them. Nobody who waits is
//! forgotten, and what was discarded is never again what the source holds.

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::sync::atomic::Ordering::SeqCst;
use loom::thread;

use super::stay::Stay;
use super::turns::Turns;
use crate::memory::{Claim, PageState, Pages};

const MISSING: u64 = 0;
const SNAPSHOT: u64 = 1;
const ZERO: u64 = 2;

/// One page: what the guest's memory has of it, into which a fill goes only where nothing is (COPY), and its trap.
struct Vm {
    pages: Pages,
    stays: [Stay; 2],
    turns: Turns,
    memory: AtomicU64,
    armed: AtomicU64,
}

impl Vm {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            pages: Pages::new(1),
            stays: [Stay::new(), Stay::new()],
            turns: Turns::new(1),
            memory: AtomicU64::new(MISSING),
            armed: AtomicU64::new(1),
        })
    }

    /// An access: it exits for as long as the trap is armed, or nothing is there.
    fn touch(&self, seat: usize) {
        while self.armed.load(SeqCst) == 1 || self.memory.load(SeqCst) == MISSING {
            if !self.resolve(seat) {
                let is_coming = || matches!(self.pages.state(0), PageState::InFlight | PageState::Clearing);
                self.turns.wait(0, is_coming);
            }
        }
    }

    fn resolve(&self, seat: usize) -> bool {
        let _inside = self.stays[seat].enter();
        let contents = match self.pages.claim(0) {
            Claim::Fill => SNAPSHOT,
            // What is out of the memory though it was there has been discarded.
            Claim::Clear | Claim::Present => ZERO,
            Claim::Wait => return false,
            claim => panic!("{claim:?}"),
        };
        let _there = self.memory.compare_exchange(MISSING, contents, SeqCst, SeqCst);
        self.armed.store(0, SeqCst);
        self.pages.settle(0);
        self.turns.over(0..1);
        true
    }

    fn discard(&self) {
        self.pages.remove(0);
        self.stays.iter().for_each(Stay::outlast);
        self.armed.store(1, SeqCst);
        self.memory.store(MISSING, SeqCst);
        self.turns.over(0..1);
    }
}

fn explore(switches: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(switches);
    builder.check(model);
}

#[test]
fn loom_threads_meet_on_a_page_and_each_goes_on() {
    explore(4, || {
        let vm = Vm::new();
        let other = Arc::clone(&vm);
        let other = thread::spawn(move || other.touch(1));
        vm.touch(0);
        other.join().unwrap();
        assert_eq!(vm.memory.load(SeqCst), SNAPSHOT);
        assert_eq!(vm.pages.state(0), PageState::Present);
    });
}

#[test]
fn loom_after_a_discard_no_thread_brings_the_snapshot_back() {
    explore(4, || {
        let vm = Vm::new();
        let discards = Arc::clone(&vm);
        let discards = thread::spawn(move || {
            discards.discard();
            // From here on.
            assert_ne!(discards.memory.load(SeqCst), SNAPSHOT);
        });
        vm.touch(0);
        discards.join().unwrap();
        assert_ne!(vm.memory.load(SeqCst), SNAPSHOT);
        vm.touch(0);
        assert_eq!(vm.memory.load(SeqCst), ZERO);
    });
}

#[test]
fn loom_a_discard_among_two_threads_is_final() {
    explore(2, || {
        let vm = Vm::new();
        let (other, discards) = (Arc::clone(&vm), Arc::clone(&vm));
        let other = thread::spawn(move || other.touch(1));
        let discards = thread::spawn(move || discards.discard());
        vm.touch(0);
        other.join().unwrap();
        discards.join().unwrap();
        assert_ne!(vm.memory.load(SeqCst), SNAPSHOT);
    });
}

#[test]
fn loom_two_discards_outlast_a_stay_and_are_woken_when_it_ends() {
    explore(2, || {
        let (stay, bringing) = (Arc::new(Stay::new()), Arc::new(AtomicU64::new(0)));
        let inside = stay.enter();
        bringing.store(1, SeqCst);
        let discards: Vec<_> = (0..2)
            .map(|_| {
                let (stay, bringing) = (Arc::clone(&stay), Arc::clone(&bringing));
                thread::spawn(move || {
                    stay.outlast();
                    assert_eq!(bringing.load(SeqCst), 0);
                })
            })
            .collect();
        bringing.store(0, SeqCst);
        drop(inside);
        // The next one changes the word that they sleep on.
        drop(stay.enter());
        discards.into_iter().for_each(|discard| discard.join().unwrap());
    });
}
