//! What stands for the gate where faults are resolved on the threads that take them: they pass each other freely, and a discard
//! waits until all who are inside have left, and keeps others out for as long as it takes to mark its pages.

use super::word::Word;
use crate::memory::atomic::{AtomicU64, Mutex, MutexGuard, Ordering, fence};

/// Whoever is inside, counted on cache lines that few threads share.
#[derive(Debug)]
pub(super) struct Passes {
    inside: Box<[Count]>,
    /// Odd while a discard keeps others out.
    closed: Word,
    /// Advances when someone leaves while it is closed.
    left: Word,
    closing: Mutex<()>,
}

#[derive(Debug)]
#[repr(align(64))]
struct Count(AtomicU64);

/// Someone is inside.
pub(super) struct Pass<'a> {
    passes: &'a Passes,
    line: usize,
}

/// Nobody is inside, and nobody comes in.
pub(super) struct Closed<'a> {
    passes: &'a Passes,
    _closing: MutexGuard<'a, ()>,
}

impl Passes {
    /// With so many counts.
    pub(super) fn new(lines: usize) -> Self {
        Self {
            inside: (0..lines.max(1)).map(|_| Count(AtomicU64::new(0))).collect(),
            closed: Word::new(),
            left: Word::new(),
            closing: Mutex::new(()),
        }
    }

    /// Goes inside. Waits while a discard marks its pages. Threads with different numbers do not meet on a line.
    pub(super) fn enter(&self, number: usize) -> Pass<'_> {
        let line = number % self.inside.len();
        loop {
            self.inside[line].0.fetch_add(1, Ordering::AcqRel);
            // With the fence in `close`: of who comes in and who closes, one sees the other.
            fence(Ordering::SeqCst);
            let closed = self.closed.load();
            let pass = Pass { passes: self, line };
            if closed & 1 == 0 {
                return pass;
            }
            drop(pass);
            self.closed.sleep(closed);
        }
    }

    /// Waits until nobody is inside, and keeps others out.
    pub(super) fn close(&self) -> Closed<'_> {
        let closing = self.closing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.closed.advance();
        fence(Ordering::SeqCst);
        for count in &self.inside {
            loop {
                let left = self.left.load();
                if count.0.load(Ordering::Acquire) == 0 {
                    break;
                }
                self.left.sleep(left);
            }
        }
        Closed { passes: self, _closing: closing }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.passes.inside[self.line].0.fetch_sub(1, Ordering::AcqRel);
        // With the fence in `close`: who leaves sees that somebody waits for it, or is not waited for.
        fence(Ordering::SeqCst);
        if self.passes.closed.load() & 1 == 1 {
            self.passes.left.advance();
            self.passes.left.wake();
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.passes.closed.advance();
        self.passes.closed.wake();
    }
}
