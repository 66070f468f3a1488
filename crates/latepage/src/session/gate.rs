//! The gate: the one exclusive section of a session, or of each of its shards, which a worker tries and never waits for.
//!
//! madvise(2) goes on as soon as its REMOVE event has been *read*. A thread that looked at the page table before that and calls
//! COPY after it would bring a discarded page back from the snapshot. So reading events and installing pages exclude each
//! other, shard by shard (most sessions are one: see `shard.rs`). Whoever may wait (population, an I/O thread) holds the gate for
//! one short slice; a worker that finds it held leaves a mark, and the holder serves the faults before it goes.

use std::sync::{PoisonError, TryLockError};

use crate::memory::atomic::{AtomicBool, Mutex, MutexGuard, Ordering, fence};

pub(super) struct Gate<T> {
    inside: Mutex<T>,
    wanted: AtomicBool,
    /// loom's mutex never lets `try_lock` fail where it could: this says that someone is inside, and may be seen late.
    #[cfg(loom)]
    held: AtomicBool,
}

impl<T> Gate<T> {
    pub(super) fn new(value: T) -> Self {
        Self {
            inside: Mutex::new(value),
            wanted: AtomicBool::new(false),
            #[cfg(loom)]
            held: AtomicBool::new(false),
        }
    }

    /// Waits for the gate.
    pub(super) fn enter(&self) -> MutexGuard<'_, T> {
        let guard = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        #[cfg(loom)]
        self.held.store(true, Ordering::Relaxed);
        guard
    }

    /// The gate, or `None` with a mark left that its holder will see: the work that brought the caller here is done by him.
    pub(super) fn try_enter(&self) -> Option<MutexGuard<'_, T>> {
        if let Some(guard) = self.attempt() {
            return Some(guard);
        }
        // A swap, as a store of this ordering is one on x86 anyway: so loom, too, knows which of a mark and a taking came first.
        self.wanted.swap(true, Ordering::SeqCst);
        // With the fence in `unlock`: of a mark and an unlocking at the same time, one is seen. A mutex alone promises less.
        fence(Ordering::SeqCst);
        // The holder may have left between the attempt and the mark, having seen none. Then the gate is free now.
        let guard = self.attempt()?;
        self.wanted.store(false, Ordering::SeqCst);
        Some(guard)
    }

    fn attempt(&self) -> Option<MutexGuard<'_, T>> {
        #[cfg(loom)]
        if self.held.load(Ordering::Relaxed) {
            return None;
        }
        let guard = match self.inside.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        #[cfg(loom)]
        self.held.store(true, Ordering::Relaxed);
        Some(guard)
    }

    fn unlock(&self, guard: MutexGuard<'_, T>) {
        #[cfg(loom)]
        self.held.store(false, Ordering::Relaxed);
        drop(guard);
        fence(Ordering::SeqCst);
    }

    /// Whether someone left a mark; takes it.
    pub(super) fn take_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) && self.wanted.swap(false, Ordering::SeqCst)
    }

    /// Leaves, and takes the mark that was left meanwhile, if there is one.
    pub(super) fn leave_marked(&self, guard: MutexGuard<'_, T>) -> bool {
        self.unlock(guard);
        self.take_wanted()
    }

    /// Leaves, and comes back with the guard if a mark was left meanwhile that nobody else has taken on.
    pub(super) fn leave<'a>(&'a self, guard: MutexGuard<'a, T>) -> Option<MutexGuard<'a, T>> {
        self.unlock(guard);
        if !self.wanted.load(Ordering::SeqCst) {
            return None;
        }
        // Whoever holds it now sees the mark when he leaves.
        let guard = self.attempt()?;
        Some(guard)
    }
}

/// Every interleaving of a worker that comes while another thread holds the gate.
#[cfg(all(test, loom))]
mod races {
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;
    use loom::thread;

    use super::*;

    /// Serves what waits, as a session does, for whoever has the gate.
    fn serve_and_leave<'a>(gate: &'a Gate<usize>, mut guard: MutexGuard<'a, usize>, waiting: &AtomicUsize) {
        loop {
            *guard += waiting.swap(0, Ordering::Relaxed);
            match gate.leave(guard) {
                Some(again) => guard = again,
                None => return,
            }
            gate.take_wanted();
        }
    }

    fn worker(gate: &Gate<usize>, waiting: &AtomicUsize) {
        waiting.fetch_add(1, Ordering::Relaxed);
        if let Some(guard) = gate.try_enter() {
            serve_and_leave(gate, guard, waiting);
        }
    }

    /// One slice of population: it serves only if it was asked to.
    fn populator(gate: &Gate<usize>, waiting: &AtomicUsize) {
        let guard = gate.enter();
        if gate.take_wanted() {
            return serve_and_leave(gate, guard, waiting);
        }
        if let Some(again) = gate.leave(guard) {
            gate.take_wanted();
            serve_and_leave(gate, again, waiting);
        }
    }

    /// Every interleaving with so many switches from a thread that could have gone on: without a bound, minutes.
    fn explore(populators: usize, faults: usize, switches: usize) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(switches);
        model.check(move || {
            let gate = Arc::new(Gate::new(0));
            let waiting = Arc::new(AtomicUsize::new(0));
            let holders: Vec<_> = (0..populators)
                .map(|_| {
                    let (gate, waiting) = (Arc::clone(&gate), Arc::clone(&waiting));
                    thread::spawn(move || populator(&gate, &waiting))
                })
                .collect();
            for _ in 0..faults {
                worker(&gate, &waiting);
            }
            for holder in holders {
                holder.join().unwrap();
            }
            assert_eq!(waiting.load(Ordering::Relaxed), 0, "a fault that nobody serves");
        });
    }

    #[test]
    fn loom_a_fault_that_finds_the_gate_held_is_served_by_its_holder() {
        explore(1, 2, 4);
    }

    #[test]
    fn loom_a_fault_that_meets_two_holders_is_served_by_one_of_them() {
        explore(2, 1, 3);
    }
}
