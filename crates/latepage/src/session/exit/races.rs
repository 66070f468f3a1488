//! loom: no snapshot after a discard though nobody holds a gate, and nobody who waits for a page is forgotten.

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::sync::atomic::Ordering::SeqCst;
use loom::thread;

use super::passes::Passes;
use super::turns::Turns;
use crate::memory::{Claim, PageState, Pages};

const MISSING: u64 = 0;
const SNAPSHOT: u64 = 1;
const ZERO: u64 = 2;

/// One page, and the guest's mapping, into which an install goes only where nothing is.
struct Vm {
    pages: Pages,
    passes: Passes,
    turns: Turns,
    mapping: AtomicU64,
}

impl Vm {
    fn new() -> Arc<Self> {
        let mapping = AtomicU64::new(MISSING);
        Arc::new(Self { pages: Pages::new(1), passes: Passes::new(2), turns: Turns::new(1), mapping })
    }

    fn touch(&self, number: usize) {
        while self.mapping.load(SeqCst) == MISSING {
            let pass = self.passes.enter(number);
            let contents = match self.pages.claim(0) {
                Claim::Fill => SNAPSHOT,
                Claim::Clear | Claim::Present => ZERO,
                Claim::Wait => {
                    drop(pass);
                    self.turns.wait(0, || {
                        self.pages.state(0).is_lacking() && self.pages.state(0) != PageState::Absent
                    });
                    continue;
                }
                claim => panic!("{claim:?}"),
            };
            let _there = self.mapping.compare_exchange(MISSING, contents, SeqCst, SeqCst);
            self.pages.settle(0);
            self.turns.over(0);
        }
    }
}

fn explore(switches: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(switches);
    builder.check(model);
}

#[test]
fn loom_exits_meet_on_a_page_and_each_goes_on() {
    explore(4, || {
        let vm = Vm::new();
        let other = Arc::clone(&vm);
        let other = thread::spawn(move || other.touch(1));
        vm.touch(0);
        other.join().unwrap();
        assert_eq!(vm.mapping.load(SeqCst), SNAPSHOT);
    });
}

#[test]
fn loom_after_a_discard_no_exit_brings_the_snapshot_back() {
    explore(4, || {
        let vm = Vm::new();
        let discards = Arc::clone(&vm);
        let discards = thread::spawn(move || {
            {
                let _closed = discards.passes.close();
                discards.pages.remove(0);
            }
            discards.mapping.store(MISSING, SeqCst);
        });
        vm.touch(0);
        discards.join().unwrap();
        assert_ne!(vm.mapping.load(SeqCst), SNAPSHOT);
        vm.touch(0);
        assert_eq!(vm.mapping.load(SeqCst), ZERO);
    });
}
