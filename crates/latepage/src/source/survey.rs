//! The thread that keeps up with what the page cache holds of a file (`latepage-survey`).
//!
//! It looks once when the file is opened, and again when it is asked to, which is about once a second while VMs lack memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::cached::{Cached, Looking, STRETCH};
use super::extents::Extents;
use super::lease::Trust;
use super::opened::Opened;
use super::scan::Keeping;

/// How long a look may take that is not the first: of a large file it goes on from there the next time.
const AT_A_TIME: Duration = Duration::from_millis(20);

/// How long the file stays mapped after the last VM that lacked memory: the next one may be on its way.
const LINGER: Duration = Duration::from_millis(250);

/// Between two looks, at least: many VMs may come at once.
const PAUSE: Duration = Duration::from_millis(500);

/// The thread, for as long as the source lives.
#[derive(Debug)]
pub(super) struct Survey {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    wish: Mutex<Wish>,
    changed: Condvar,
    /// It has looked at all of the file, once at least.
    looked: AtomicBool,
}

#[derive(Debug, Default)]
struct Wish {
    /// Somebody wants it to look.
    look: bool,
    /// VMs may lack memory. Where none does, nothing stays mapped.
    serving: bool,
    /// Nothing is mapped, as far as this thread knows.
    unmapped: bool,
    /// When that was asked for.
    rested: Option<Instant>,
    /// Looks that it has finished, and when it did so last.
    looks: u64,
    last: Option<Instant>,
    ended: bool,
}

impl Shared {
    fn wish(&self) -> MutexGuard<'_, Wish> {
        self.wish.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What it looks at.
pub(super) struct Surveyed {
    pub(super) file: Arc<Opened>,
    pub(super) extents: Arc<Extents>,
    pub(super) cached: Arc<Cached>,
    pub(super) keeping: Arc<Keeping>,
    pub(super) trust: Trust,
}

impl Survey {
    /// Begins to look. Where no thread can be had nothing is at hand, and all is as it would be without.
    pub(super) fn start(of: Surveyed) -> Self {
        let shared = Arc::new(Shared {
            wish: Mutex::new(Wish { look: true, unmapped: true, ..Wish::default() }),
            ..Shared::default()
        });
        let for_thread = Arc::clone(&shared);
        let thread = thread::Builder::new().name("latepage-survey".to_owned());
        let thread = thread.spawn(move || keep(&for_thread, &of)).ok();
        Self { shared, thread }
    }

    /// Has it look again, unless it has only just done so.
    pub(super) fn look(&self) {
        let mut wish = self.shared.wish();
        if wish.last.is_some_and(|last| last.elapsed() >= PAUSE) {
            wish.look = true;
            self.shared.changed.notify_all();
        }
    }

    /// Whether it has looked at all of the file once.
    pub(super) fn has_looked(&self) -> bool {
        self.shared.looked.load(Ordering::Acquire)
    }

    /// A VM comes. Returns whether it is the first since the last [`rest`](Self::rest).
    pub(super) fn serve(&self) -> bool {
        let mut wish = self.shared.wish();
        let first = !std::mem::replace(&mut wish.serving, true);
        wish.look |= first;
        self.shared.changed.notify_all();
        first
    }

    /// No VM lacks memory: nothing is to stay mapped, soon.
    pub(super) fn rest(&self) {
        let mut wish = self.shared.wish();
        if std::mem::take(&mut wish.serving) {
            wish.unmapped = false;
            wish.rested = Some(Instant::now());
            self.shared.changed.notify_all();
        }
    }

    /// Waits until it has looked at what was there when this was called.
    #[cfg(test)]
    pub(super) fn wait(&self) {
        let mut wish = self.shared.wish();
        // One may be under way, which has passed what the caller means.
        for _ in 0..2 {
            let before = wish.looks;
            wish.look = true;
            self.shared.changed.notify_all();
            while wish.looks == before {
                wish = self.shared.changed.wait(wish).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Drop for Survey {
    fn drop(&mut self) {
        self.shared.wish().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It looks at the wish after each stretch.
            let _ = thread.join();
        }
    }
}

fn keep(shared: &Shared, of: &Surveyed) {
    let mut with = Looking::new();
    let (mut from, mut first) = (0, true);
    loop {
        let mut wish = shared.wish();
        loop {
            if wish.look || wish.ended {
                break;
            }
            if wish.serving || wish.unmapped {
                wish = shared.changed.wait(wish).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let left = wish.rested.map_or(Duration::ZERO, |rested| LINGER.saturating_sub(rested.elapsed()));
            if left.is_zero() {
                break;
            }
            wish = shared.changed.wait_timeout(wish, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if wish.ended {
            drop(wish);
            return of.keeping.keep();
        }
        let look = std::mem::take(&mut wish.look);
        if !look {
            wish.unmapped = true;
        }
        drop(wish);
        if look {
            let deadline = (!first).then(|| Instant::now() + AT_A_TIME);
            from = walk(shared, of, from, deadline, &mut with);
            first = false;
            if !shared.looked.swap(true, Ordering::AcqRel) {
                of.keeping.keep();
            }
        } else {
            of.cached.unmap(0..of.file.size);
            of.keeping.keep();
        }
        let mut wish = shared.wish();
        wish.looks += u64::from(look);
        wish.last = Some(Instant::now());
        shared.changed.notify_all();
    }
}

/// Looks at the file from an offset on, around its end, and back to where it began, unless the time is over. Returns where to go on.
fn walk(shared: &Shared, of: &Surveyed, from: u64, deadline: Option<Instant>, with: &mut Looking) -> u64 {
    let still = || of.trust.is_leased();
    for (start, end) in [(from, of.file.size), (0, from)] {
        let mut at = start;
        while let Some(data) = of.extents.data_from(at).filter(|data| data.start < end) {
            let next = (data.start / STRETCH + 1) * STRETCH;
            let stretch = data.start..data.end.min(next).min(end);
            at = stretch.end;
            let all_there = of.cached.look(&of.file, stretch.clone(), with, still);
            let wish = shared.wish();
            let (ended, serving) = (wish.ended, wish.serving);
            drop(wish);
            if serving && all_there {
                of.cached.map(stretch);
            } else if !serving {
                of.cached.unmap(stretch);
            }
            if ended || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return at;
            }
        }
    }
    from
}
