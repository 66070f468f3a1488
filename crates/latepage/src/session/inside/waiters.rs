//! Threads of this process that wait for a page which another one is bringing.
//!
//! Who brings a page looks at one word to know that nobody waits, which no vCPU writes to unless one does wait: vCPUs that fault
//! on pages of their own share no cache line here, and take no lock.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Condvar, Mutex, PoisonError};

/// Buckets; pages share them by number.
const BUCKETS: u32 = 64;
/// Looks at the page before its waiter sleeps: an install whose contents are in memory takes some microseconds.
const SPINS: u32 = 200;

/// See the module.
pub(super) struct Waiters {
    buckets: Box<[Bucket]>,
}

#[derive(Default)]
#[repr(align(128))]
struct Bucket {
    sleepers: AtomicU32,
    asleep: Mutex<()>,
    moved: Condvar,
}

impl Waiters {
    pub(super) fn new() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| Bucket::default()).collect() }
    }

    /// Waits while `is_coming` says that the page is, which [`notify`](Self::notify) has looked at again.
    pub(super) fn wait(&self, page: u32, is_coming: impl Fn() -> bool) {
        for _ in 0..SPINS {
            if !is_coming() {
                return;
            }
            std::hint::spin_loop();
        }
        let bucket = &self.buckets[(page % BUCKETS) as usize];
        bucket.sleepers.fetch_add(1, Ordering::SeqCst);
        // With the fence in `notify`: of a sleeper that comes and a page that goes at the same time, one sees the other.
        fence(Ordering::SeqCst);
        let mut asleep = bucket.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        while is_coming() {
            asleep = bucket.moved.wait(asleep).unwrap_or_else(PoisonError::into_inner);
        }
        drop(asleep);
        bucket.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Has everyone look again who waits for one of these pages, whose states have changed.
    pub(super) fn notify(&self, pages: &Range<u32>) {
        fence(Ordering::SeqCst);
        for page in pages.clone().take(BUCKETS as usize) {
            let bucket = &self.buckets[(page % BUCKETS) as usize];
            if bucket.sleepers.load(Ordering::SeqCst) > 0 {
                // Whoever has looked already, and not slept yet, does so under this lock.
                drop(bucket.asleep.lock().unwrap_or_else(PoisonError::into_inner));
                bucket.moved.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_is_woken_whenever_the_page_comes() {
        const ROUNDS: u32 = 3000;
        let (waiters, came) = (Waiters::new(), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (waiters, came) = (&waiters, &came);
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        // Some with a bucket to themselves, some not.
                        waiters.wait(round + 64 * thread, || came.load(Ordering::Acquire) <= round);
                    }
                });
            }
            for round in 0..ROUNDS {
                came.store(round + 1, Ordering::Release);
                waiters.notify(&(round..round + 1));
            }
        });
    }

    #[test]
    fn a_long_run_wakes_every_bucket() {
        let (waiters, came) = (Waiters::new(), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for page in [0, 63, 64, 999] {
                let (waiters, came) = (&waiters, &came);
                scope.spawn(move || waiters.wait(page, || came.load(Ordering::Acquire) == 0));
            }
            came.store(1, Ordering::Release);
            waiters.notify(&(0..1000));
        });
    }
}
