//! What one thread has to itself.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::stay::Stay;

/// Cache lines of its own, so that no two threads write to the same.
#[repr(align(128))]
pub(super) struct Desk {
    /// Somebody sits there.
    pub(super) taken: AtomicBool,
    pub(super) stay: Stay,
    pub(super) exits: Tally,
    pub(super) faults: Tally,
    pub(super) joined: Tally,
    pub(super) present: Tally,
    pub(super) filled: Tally,
    pub(super) zero: Tally,
    pub(super) beside: Tally,
}

impl Desk {
    pub(super) fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            stay: Stay::new(),
            exits: Tally::default(),
            faults: Tally::default(),
            joined: Tally::default(),
            present: Tally::default(),
            filled: Tally::default(),
            zero: Tally::default(),
            beside: Tally::default(),
        }
    }
}

/// A count that only the thread of its desk changes, and anybody reads.
#[derive(Default)]
pub(super) struct Tally(AtomicU64);

impl Tally {
    pub(super) fn add(&self, n: u64) {
        // No read-modify-write: nobody else writes. Relaxed: a count orders nothing else.
        self.0.store(self.0.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// What was counted before it came, and has not come.
    pub(super) fn take_back(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed) - n, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the threads of one resolver have done together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResolverStats {
    /// Accesses that came back to their thread: memory-fault exits, and signals.
    pub exits: u64,
    /// Faults by userfaultfd: KVM's own accesses, and the VMM's.
    pub faults: u64,
    /// Of both, those for a page that somebody was bringing already.
    pub joined: u64,
    /// Of both, those for a page that was there when they were looked at.
    pub present: u64,
    /// Pages filled from the source.
    pub filled: u64,
    /// Pages that came as zero: holes of the source, contents that are zero where that is known, and discarded ones.
    pub zero: u64,
    /// Pages that came unasked, beside one that was.
    pub beside: u64,
}

impl ResolverStats {
    pub(super) fn of(desks: &[Desk]) -> Self {
        let sum = |of: fn(&Desk) -> &Tally| desks.iter().map(|desk| of(desk).get()).sum();
        Self {
            exits: sum(|desk| &desk.exits),
            faults: sum(|desk| &desk.faults),
            joined: sum(|desk| &desk.joined),
            present: sum(|desk| &desk.present),
            filled: sum(|desk| &desk.filled),
            zero: sum(|desk| &desk.zero),
            beside: sum(|desk| &desk.beside),
        }
    }
}
