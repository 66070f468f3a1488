//! The gate: a session's one exclusive section, which a worker tries and never waits for.
//!
//! madvise(2) goes on as soon as its REMOVE event has been *read*. A thread that looked at the page table before that and calls
//! COPY after it would bring a discarded page back from the snapshot. So reading events and installing pages exclude each
//! other, session by session. Whoever may wait (population, an I/O thread) holds the gate for one short slice; a worker that
//! finds it held leaves a mark, and the holder serves the faults before it goes.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

pub(super) struct Gate<T> {
    inside: Mutex<T>,
    wanted: AtomicBool,
}

impl<T> Gate<T> {
    pub(super) fn new(value: T) -> Self {
        Self { inside: Mutex::new(value), wanted: AtomicBool::new(false) }
    }

    /// Waits for the gate.
    pub(super) fn enter(&self) -> MutexGuard<'_, T> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gate, or `None` with a mark left that its holder will see: the work that brought the caller here is done by him.
    pub(super) fn try_enter(&self) -> Option<MutexGuard<'_, T>> {
        if let Some(guard) = self.attempt() {
            return Some(guard);
        }
        self.wanted.store(true, Ordering::SeqCst);
        // With the fence in `leave`: of a mark and an unlocking at the same time, one is seen. A mutex alone promises less.
        fence(Ordering::SeqCst);
        // The holder may have left between the attempt and the mark, having seen none. Then the gate is free now.
        let guard = self.attempt()?;
        self.wanted.store(false, Ordering::SeqCst);
        Some(guard)
    }

    fn attempt(&self) -> Option<MutexGuard<'_, T>> {
        match self.inside.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether someone left a mark; takes it.
    pub(super) fn take_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) && self.wanted.swap(false, Ordering::SeqCst)
    }

    /// Leaves, and takes the mark that was left meanwhile, if there is one.
    pub(super) fn leave_marked(&self, guard: MutexGuard<'_, T>) -> bool {
        drop(guard);
        fence(Ordering::SeqCst);
        self.take_wanted()
    }

    /// Leaves, and comes back with the guard if a mark was left meanwhile that nobody else has taken on.
    pub(super) fn leave<'a>(&'a self, guard: MutexGuard<'a, T>) -> Option<MutexGuard<'a, T>> {
        drop(guard);
        fence(Ordering::SeqCst);
        if !self.wanted.load(Ordering::SeqCst) {
            return None;
        }
        // Whoever holds it now sees the mark when he leaves.
        let guard = self.attempt()?;
        Some(guard)
    }
}
