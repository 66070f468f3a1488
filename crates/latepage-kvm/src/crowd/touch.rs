//! The touching itself. It is that of the benches' C program (`bench/limit/throng.c`), so that the two differ by the delivery alone.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Instant;

use latepage::sys::mapping::Mapping;
use rustix::time::{ClockId, clock_gettime};

use super::{Crowd, CrowdReport};
use crate::error::VmError;
use crate::supply::{Came, Seat};
use crate::sys::sigbus::{install_handler, seated};

const PAGE: usize = 4096;
/// Enough for a handler that resolves a fault.
const STACK: usize = 256 << 10;

/// Word `n` of the benches' memory files (splitmix64; `bench/limit/common.h`).
pub fn word_at(n: u64) -> u64 {
    let mut z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The numbers below `count`, shuffled (Fisher-Yates).
fn shuffled(count: u32, seed: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count).collect();
    for i in (1..count as usize).rev() {
        let random = word_at(seed.wrapping_mul(0x1000_0000).wrapping_add(i as u64));
        order.swap(i, (random % (i as u64 + 1)) as usize);
    }
    order
}

/// Touches pages of `view`, each once, by as many threads as the crowd has. `around` is called on each of them, with its number, and
/// runs what it is given: that is where a thread sits down, say.
pub(super) fn touch_all(
    crowd: &Crowd,
    view: &Mapping,
    around: impl Fn(u32, &mut dyn FnMut()) + Sync,
) -> Result<CrowdReport, VmError> {
    let mut order = shuffled(crowd.pages, crowd.seed);
    order.truncate(crowd.touches as usize);
    let order = &order[..];
    let threads = crowd.threads as usize;
    // The last of them to be ready says when it began, and the last to be done when it ended: nobody else is waited for meanwhile.
    let (begin, end) = (Turn::new(threads), Turn::new(threads));
    let (wrong, cpu_ns) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = |number: usize| {
        // Written to, so that times are taken without faults of our own.
        let mut took = vec![1u64; order.len().div_ceil(threads)];
        let mut count = 0;
        around(number as u32, &mut || {
            begin.pass();
            let (mut bad, before) = (0, used());
            for page in order.iter().skip(number).step_by(threads) {
                let before = Instant::now();
                let word = view.load(*page as usize * PAGE);
                took[count] = before.elapsed().as_nanos() as u64;
                count += 1;
                bad += u64::from(word != word_at(u64::from(*page) * (PAGE / 8) as u64));
            }
            wrong.fetch_add(bad, Ordering::Relaxed);
            cpu_ns.fetch_add(used() - before, Ordering::Relaxed);
            end.pass();
        });
        took.truncate(count);
        took
    };
    thread::scope(|scope| {
        let mut running = Vec::with_capacity(threads);
        for number in 0..threads {
            let work = &work;
            let started = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, move || work(number));
            match started {
                Ok(thread) => running.push(thread),
                Err(error) => {
                    // Those that run wait for all; they are joined at the end of the scope.
                    begin.open();
                    end.open();
                    return Err(VmError::thread(&error));
                }
            }
        }
        let mut took = Vec::with_capacity(order.len());
        for thread in running {
            took.extend(thread.join().expect("a toucher has no reason to panic"));
        }
        took.sort_unstable();
        let there = took.partition_point(|ns| *ns < 1000);
        let served = &took[there..];
        let quantile = |share: f64| {
            let place = (share * served.len() as f64) as usize;
            served.get(place.min(served.len().saturating_sub(1))).copied().unwrap_or(0)
        };
        Ok(CrowdReport {
            ns: (end.when() - begin.when()).as_nanos() as u64,
            cpu_ns: cpu_ns.load(Ordering::Relaxed),
            touches: took.len(),
            there,
            wrong: wrong.load(Ordering::Relaxed),
            p50: quantile(0.5),
            p99: quantile(0.99),
        })
    })
}

/// The same, by threads whose accesses come back to them: `resolver` makes for each the function that sees to them. That one runs in
/// the handler of a signal, in the middle of the access: it allocates nothing and takes no lock.
pub(super) fn touch_trapping<F: FnMut(u64) -> bool + Send>(
    crowd: &Crowd,
    view: &Mapping,
    resolver: impl Fn(u32) -> F + Sync,
) -> Result<CrowdReport, VmError> {
    install_handler().map_err(|source| VmError::thread(&source))?;
    touch_all(crowd, view, |number, work| seated(&mut Resolving(resolver(number)), work))
}

/// The seat of one thread of a crowd.
struct Resolving<F>(F);

impl<F: FnMut(u64) -> bool + Send> Seat for Resolving<F> {
    fn exit(&mut self, _: u64, _: &AtomicBool) -> Came {
        Came::Not("a crowd has no vCPUs".into())
    }

    fn touch(&mut self, address: u64) -> bool {
        self.0(address)
    }
}

impl<F> fmt::Debug for Resolving<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolving")
    }
}

/// Something that all threads pass together.
struct Turn {
    threads: usize,
    came: AtomicUsize,
    /// When the last one came.
    last: OnceLock<Instant>,
    open: Mutex<bool>,
    opened: Condvar,
}

impl Turn {
    fn new(threads: usize) -> Self {
        Self {
            threads,
            came: AtomicUsize::new(0),
            last: OnceLock::new(),
            open: Mutex::new(false),
            opened: Condvar::new(),
        }
    }

    fn pass(&self) {
        if self.came.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            self.last.get_or_init(Instant::now);
            return self.open();
        }
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(open, |open| !*open));
    }

    /// Lets everybody through.
    fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }

    fn when(&self) -> Instant {
        *self.last.get().expect("all have passed")
    }
}

/// CPU of this thread. What a source's own threads do when a file is opened is no fault's.
fn used() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_visits_each_page_once() {
        let mut order = shuffled(1000, 7);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }
}
