//! The thread that draws a cold file into memory (`latepage-cold`): what nobody waits for yet, behind every fault.
//!
//! A fault's own page is read by a reader of the pager, who does not stand in any queue here. This thread has a bounded number of
//! bytes under way, so that such a read has never more than those before it at the device.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::fs::Advice;

use crate::sys::file;

use super::ahead::Ahead;
use super::cached::{Cached, Looking};
use super::extents::Extents;
use super::lease::Trust;
use super::opened::Opened;

/// Asked for at a time.
const PIECE: u64 = 256 << 10;
/// What a device must be told to read ahead for the kernel to keep enough under way by itself, in bytes.
const DEEP: u64 = 1 << 20;
/// How many of them are under way, where it does not.
const DEPTH: usize = 16;

/// Between two looks how far the walker of a sequence has come, and how long he may stand still.
const GLANCE: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_millis(50);

/// What was read.
#[derive(Debug, Default)]
pub(super) struct Counts {
    reads: AtomicU64,
    bytes: AtomicU64,
    merged: AtomicU64,
}

/// The thread, for as long as the source lives. It is started by the first miss.
#[derive(Debug)]
pub(super) struct Cold {
    shared: Arc<Shared>,
    thread: OnceLock<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    file: Arc<Opened>,
    extents: Arc<Extents>,
    cached: Option<Arc<Cached>>,
    trust: Trust,
    ahead: Ahead,
    counts: Counts,
    /// The page that was touched last, as far as that is known.
    touched: AtomicU64,
    wish: Mutex<Wish>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Wish {
    /// What is to be read, the next first.
    ranges: VecDeque<Range<u64>>,
    ended: bool,
}

impl Cold {
    pub(super) fn new(
        file: Arc<Opened>,
        extents: Arc<Extents>,
        cached: Option<Arc<Cached>>,
        trust: Trust,
    ) -> Self {
        let ahead = Ahead::new(file.size, file::read_ahead(file.fd.as_fd()));
        let (wish, changed, counts) = (Mutex::default(), Condvar::new(), Counts::default());
        let touched = AtomicU64::new(0);
        let shared = Shared { file, extents, cached, trust, ahead, counts, touched, wish, changed };
        Self { shared: Arc::new(shared), thread: OnceLock::new() }
    }

    /// A guest waits for a page that was not in memory, and that the caller has read by now.
    pub(super) fn missed(&self, offset: u64) {
        self.shared.touched.store(offset, Ordering::Relaxed);
        let range = self.shared.ahead.missed(offset);
        self.draw(range, true);
    }

    /// A page was touched, which may be in memory.
    pub(super) fn touched(&self, offset: u64) {
        if self.shared.ahead.has_walker() {
            self.shared.touched.store(offset, Ordering::Relaxed);
        }
    }

    /// A VM is populated from this offset on.
    pub(super) fn populating(&self, offset: u64) {
        let range = self.shared.ahead.populating(offset);
        self.draw(range, false);
    }

    /// Whether a page of data that is not known to be in memory may be on its way there.
    pub(super) fn is_coming(&self, offset: u64) -> bool {
        self.shared.ahead.is_coming(offset)
    }

    /// Nobody is served: what is under way ends, and what is left is not wanted any more.
    pub(super) fn rest(&self) {
        self.shared.wish().ranges.clear();
        self.shared.ahead.forget();
    }

    fn draw(&self, range: Range<u64>, first: bool) {
        if range.is_empty() {
            self.shared.counts.merged.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.thread.get_or_init(|| {
            let shared = Arc::clone(&self.shared);
            // Without it everything is read when it is asked for.
            thread::Builder::new().name("latepage-cold".to_owned()).spawn(move || shared.run()).ok()
        });
        let mut wish = self.shared.wish();
        if first {
            wish.ranges.push_front(range);
        } else {
            wish.ranges.push_back(range);
        }
        drop(wish);
        self.shared.changed.notify_one();
    }
}

impl Drop for Cold {
    fn drop(&mut self) {
        self.shared.wish().ended = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take().flatten() {
            // It looks after each read.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn wish(&self) -> MutexGuard<'_, Wish> {
        self.wish.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next piece to read, of the first range and of its data; and all that is done when it has been: with it, the holes around
    /// it. `None`: there is none now, or no more ever.
    fn next(&self, wait: bool) -> Option<(Range<u64>, Range<u64>)> {
        let mut wish = self.wish();
        let mut seen = (self.touched.load(Ordering::Relaxed), Instant::now());
        loop {
            if wish.ended {
                return None;
            }
            while let Some(range) = wish.ranges.pop_front() {
                let Some(data) = self.extents.data_from(range.start).filter(|data| data.start < range.end)
                else {
                    self.ahead.read(&range);
                    continue;
                };
                let piece = data.start..data.end.min(range.end).min((data.start / PIECE + 1) * PIECE);
                let left =
                    self.extents.data_from(piece.end).map_or(range.end, |data| data.start.min(range.end));
                if left < range.end {
                    wish.ranges.push_front(left..range.end);
                }
                return Some((piece, range.start..left));
            }
            let touched = self.touched.load(Ordering::Relaxed);
            let further = self.ahead.touched(touched);
            if !further.is_empty() {
                wish.ranges.push_back(further);
                continue;
            }
            if !wait {
                return None;
            }
            if !self.ahead.has_walker() {
                wish = self.changed.wait(wish).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            // He goes on in what is in memory, where nothing is said of it: to say it would be a system call for each fault.
            wish = self.changed.wait_timeout(wish, GLANCE).unwrap_or_else(PoisonError::into_inner).0;
            if touched != seen.0 {
                seen = (touched, Instant::now());
            } else if seen.1.elapsed() >= PATIENCE {
                self.ahead.lose_walker();
            }
        }
    }

    fn run(&self) {
        let mut with = Looking::new();
        if file::read_ahead(self.file.fd.as_fd()) >= DEEP
            && let Ok(own) = file::open_again(self.file.fd.as_fd())
        {
            return self.read_along(own.as_fd(), &mut with);
        }
        let mut under_way = VecDeque::with_capacity(DEPTH);
        loop {
            while under_way.len() < DEPTH {
                let Some((piece, done)) = self.next(under_way.is_empty()) else { break };
                if !self.is_there(&piece) {
                    // The device is asked for all of it, and nobody waits yet.
                    let length = NonZeroU64::new(piece.end - piece.start);
                    let _ = rustix::fs::fadvise(&self.file.fd, piece.start, length, Advice::WillNeed);
                }
                under_way.push_back((piece, done));
            }
            let Some((piece, done)) = under_way.pop_front() else { return };
            if !self.is_there(&piece) {
                self.count(&piece);
                match &self.cached {
                    Some(cached) => {
                        cached.draw(&self.file, piece.clone(), &mut with, || self.trust.is_leased())
                    }
                    // So that no more is under way than there should be. Should it fail, whoever needs the page hears of that.
                    None => drop(file::read(self.file.fd.as_fd(), &mut [0], piece.end - 1)),
                }
            }
            self.ahead.read(&done);
        }
    }

    /// Where the kernel itself keeps much under way ahead of whoever reads in sequence: it does so in larger units than it
    /// would where it is only told that something will be needed. By an open of our own, so that the readers do not disturb the sequence.
    fn read_along(&self, own: BorrowedFd<'_>, with: &mut Looking) {
        let mut buffer = vec![0; PIECE as usize].into_boxed_slice();
        while let Some((piece, done)) = self.next(true) {
            if !self.is_there(&piece) {
                self.count(&piece);
                let into = &mut buffer[..(piece.end - piece.start) as usize];
                let whole = file::read(own, into, piece.start) == Ok(into.len());
                match &self.cached {
                    Some(cached) if whole => cached.learn_from(piece.start, into, || self.trust.is_leased()),
                    Some(cached) => cached.draw(&self.file, piece.clone(), with, || self.trust.is_leased()),
                    None => {}
                }
            }
            self.ahead.read(&done);
        }
    }

    fn count(&self, piece: &Range<u64>) {
        self.counts.reads.fetch_add(1, Ordering::Relaxed);
        self.counts.bytes.fetch_add(piece.end - piece.start, Ordering::Relaxed);
    }

    fn is_there(&self, piece: &Range<u64>) -> bool {
        self.cached.as_ref().is_some_and(|cached| cached.is_there(piece))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::super::cached::STRETCH;
    use super::super::lease::Guard;
    use super::*;

    #[test]
    fn nothing_is_on_its_way_once_all_has_been_read_whatever_holes_there_are() {
        let path = std::env::temp_dir().join(format!("latepage-cold-{}", std::process::id()));
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(4 * STRETCH).unwrap();
        // Each but the third has data in its first half alone.
        for stretch in [0, 1, 3] {
            file.write_all_at(&vec![1; STRETCH as usize / 2], stretch * STRETCH).unwrap();
        }
        drop(file);
        let opened = Arc::new(Opened::open(path.clone()).unwrap());
        let extents = Arc::new(Extents::find(opened.fd.as_fd(), opened.size).unwrap());
        let guard = Guard::new(Arc::clone(&opened));
        let cold = Cold::new(opened, extents, None, guard.trust());
        cold.populating(0);
        while (0..4).any(|stretch| cold.is_coming(stretch * STRETCH)) {
            thread::yield_now();
        }
        std::fs::remove_file(path).unwrap();
    }
}
