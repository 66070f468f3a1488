//! A word that threads of this process sleep on.

use crate::memory::atomic::{AtomicU64, Ordering};

/// The low half is what is slept on.
#[derive(Debug)]
pub(super) struct Word {
    value: AtomicU64,
    #[cfg(loom)]
    sleepers: (loom::sync::Mutex<()>, loom::sync::Condvar),
}

impl Word {
    pub(super) fn new() -> Self {
        Self {
            value: AtomicU64::new(0),
            #[cfg(loom)]
            sleepers: (loom::sync::Mutex::new(()), loom::sync::Condvar::new()),
        }
    }

    pub(super) fn load(&self) -> u64 {
        self.value.load(Ordering::Acquire)
    }

    pub(super) fn store(&self, value: u64) {
        self.value.store(value, Ordering::Release);
    }

    pub(super) fn advance(&self) {
        self.value.fetch_add(1, Ordering::AcqRel);
    }

    /// Stores a value, and returns the one before.
    pub(super) fn swap(&self, value: u64) -> u64 {
        self.value.swap(value, Ordering::AcqRel)
    }

    /// Stores a value where it is `seen`, or says what it is.
    pub(super) fn exchange(&self, seen: u64, value: u64) -> Result<u64, u64> {
        self.value.compare_exchange(seen, value, Ordering::AcqRel, Ordering::Acquire)
    }

    /// Sleeps while it is `seen`; or looks like it, for no reason.
    pub(super) fn sleep(&self, seen: u64) {
        #[cfg(not(loom))]
        let _ = crate::sys::futex::wait(&self.value, seen as u32, None);
        #[cfg(loom)]
        {
            let guard = self.sleepers.0.lock().unwrap();
            if self.value.load(Ordering::SeqCst) == seen {
                drop(self.sleepers.1.wait(guard).unwrap());
            }
        }
    }

    /// Wakes all who sleep on it.
    pub(super) fn wake(&self) {
        #[cfg(not(loom))]
        crate::sys::futex::wake(&self.value, i32::MAX);
        #[cfg(loom)]
        {
            let _guard = self.sleepers.0.lock().unwrap();
            self.sleepers.1.notify_all();
        }
    }
}

/// Looks a few times whether there is anything to wait for: what is in memory comes within some microseconds.
pub(super) fn looks_like_waiting(still: impl Fn() -> bool) -> bool {
    /// Less than what a sleep and a wake cost.
    #[cfg(not(loom))]
    const LOOKS: u32 = 100;
    #[cfg(loom)]
    const LOOKS: u32 = 1;
    for _ in 0..LOOKS {
        if !still() {
            return false;
        }
        std::hint::spin_loop();
    }
    true
}
