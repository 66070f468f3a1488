//! loom: a pager stops after any of its stores, for good, and the next one takes its table over. The guest touches and discards
//! meanwhile, in every interleaving.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p latepage --lib --release loom_`.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;

use super::{Claim, PageState, Pages};

/// What the file of the guest's memory holds at its one page. Where there is nothing, the guest reads zero.
const HOLE: u64 = 0;
const TORN: u64 = 1;
const SNAPSHOT: u64 = 2;
const GUEST: u64 = 3;

/// What has become of the discard that a thread of the VMM asks for.
const ASKED: u64 = 1;
const TOLD: u64 = 2;

/// A VM of one page, which traps where its bit is set.
///
/// Its words are changed, and looked at by a pager, by swaps: of a plain load or store loom does not try every place among the others'.
struct Vm {
    pages: Pages,
    contents: AtomicU64,
    traps: AtomicU64,
    discard: AtomicU64,
}

impl Vm {
    fn new() -> Arc<Self> {
        let [contents, traps, discard] = [HOLE, 1, 0].map(AtomicU64::new);
        Arc::new(Self { pages: Pages::new(1), contents, traps, discard })
    }

    /// A vCPU: reads the page and writes to it, if it does not trap. What it has read.
    fn touch(&self) -> Option<u64> {
        (self.traps.load(Acquire) == 0).then(|| {
            let read = self.contents.load(Relaxed);
            self.contents.swap(GUEST, Relaxed);
            read
        })
    }

    /// A thread of the VMM discards the page, if it was told that it may. Whether it has.
    fn discarded(&self) -> bool {
        let told = self.discard.fetch_or(0, Acquire) == TOLD;
        if told {
            self.contents.swap(HOLE, Relaxed);
        }
        told
    }
}

/// A pager that takes so many steps, and is dead then. As it does them, sessions do: `place.rs`, `resolve.rs` and `serve.rs`.
struct Pager<'a> {
    vm: &'a Vm,
    left: u32,
    /// What the source has.
    source: u64,
}

impl<'a> Pager<'a> {
    const LIVES: u32 = u32::MAX;

    fn new(vm: &'a Vm, source: u64, left: u32) -> Self {
        Self { vm, left, source }
    }

    fn step<R>(&mut self, step: impl FnOnce(&Vm) -> R) -> Option<R> {
        self.left = self.left.checked_sub(1)?;
        Some(step(self.vm))
    }

    /// Serves a fault. `None` where it dies meanwhile.
    fn fault(&mut self) -> Option<()> {
        match self.step(|vm| vm.pages.claim(0))? {
            Claim::Fill if self.source == HOLE => {
                if self.step(|vm| vm.contents.fetch_or(0, Relaxed))? != HOLE {
                    self.step(|vm| vm.contents.swap(HOLE, Relaxed))?;
                }
                self.step(|vm| vm.pages.filled(0))?;
                self.expose()
            }
            Claim::Fill => {
                self.step(|vm| vm.contents.swap(TORN, Relaxed))?;
                self.step(|vm| vm.contents.swap(SNAPSHOT, Relaxed))?;
                self.step(|vm| vm.pages.filled(0))?;
                self.expose()
            }
            // Whatever it holds by now is what it reads.
            Claim::Clear | Claim::Expose | Claim::Present => self.expose(),
            claim @ (Claim::Wait | Claim::Failed) => panic!("{claim:?} of a page that nobody is bringing"),
        }
    }

    fn expose(&mut self) -> Option<()> {
        self.step(|vm| vm.traps.swap(0, Release))?;
        self.step(|vm| vm.pages.settle(0)).map(drop)
    }

    /// Serves the discard that was asked for, if one was.
    fn discard(&mut self) -> Option<()> {
        if self.step(|vm| vm.discard.fetch_or(0, Acquire))? == ASKED {
            self.step(|vm| vm.pages.remove(0))?;
            self.step(|vm| vm.discard.swap(TOLD, Release))?;
        }
        Some(())
    }
}

/// Every interleaving with so many switches from a thread that could have gone on.
fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(model);
}

/// More than any pager takes.
const STEPS: u32 = 9;

#[test]
fn loom_what_the_guest_has_written_survives_a_pager_that_dies_after_any_store() {
    for (source, dies) in
        [SNAPSHOT, HOLE].into_iter().flat_map(|source| (0..STEPS).map(move |at| (source, at)))
    {
        explore(move || {
            let vm = Vm::new();
            let vcpu = {
                let vm = Arc::clone(&vm);
                thread::spawn(move || vm.touch())
            };
            let _dead = Pager::new(&vm, source, dies).fault();
            let owed = vm.pages.take_over();
            assert_eq!(owed, u64::from(vm.pages.state(0) == PageState::Absent));
            Pager::new(&vm, source, Pager::LIVES).fault().unwrap();
            let read = vcpu.join().unwrap();
            assert!(read.is_none_or(|read| read == source), "it read {read:?}");
            let holds = if read.is_some() { GUEST } else { source };
            assert_eq!((vm.touch(), vm.pages.state(0)), (Some(holds), PageState::Present));
        });
    }
}

#[test]
fn loom_what_was_discarded_is_never_the_snapshot_under_the_next_pager() {
    for (first, dies) in [false, true].into_iter().flat_map(|first| (0..STEPS + 3).map(move |at| (first, at)))
    {
        explore(move || {
            let vm = Vm::new();
            let discarder = {
                let vm = Arc::clone(&vm);
                thread::spawn(move || {
                    vm.discard.swap(ASKED, Release);
                    vm.discarded()
                })
            };
            let mut pager = Pager::new(&vm, SNAPSHOT, dies);
            let _dead = if first {
                pager.fault().and_then(|()| pager.discard())
            } else {
                pager.discard().and_then(|()| pager.fault())
            };
            vm.pages.take_over();
            let mut next = Pager::new(&vm, SNAPSHOT, Pager::LIVES);
            next.fault().unwrap();
            let discarded = discarder.join().unwrap();
            if !discarded {
                next.discard().unwrap();
                assert!(vm.discarded());
            }
            next.fault().unwrap();
            assert_eq!(vm.touch(), Some(HOLE));
        });
    }
}
