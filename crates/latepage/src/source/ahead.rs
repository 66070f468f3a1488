//! What is read from the device beyond the page that was asked for: how much, and where, by what has been missed before.
//!
//! A miss is a page that a guest waits for and that was not in memory. The first one in a stretch of 2 MiB draws in its
//! neighbourhood, as much as the kernel would read for a guest that had mapped the file; the second one the whole stretch; one right
//! behind a stretch that has been drawn in as many stretches as the misses before it promise.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicUsize, Ordering};

use super::cached::STRETCH;

/// The most stretches that are drawn in by one miss.
const DEEPEST: u32 = 8;
/// The least that is drawn in around a miss, and the most, in bytes.
const NEIGHBOURHOODS: (u64, u64) = (64 << 10, 8 << 20);

/// What has become of a stretch.
const UNTOUCHED: u8 = 0;
/// The neighbourhood of a miss in it has been asked for.
const PARTLY: u8 = 1;
/// All of it has been asked for, and is perhaps under way.
const ASKED: u8 = 2;
/// All of it has been read. What is missed of it has gone again.
const READ: u8 = 3;

/// What has been missed of a file, and drawn in. Races between those who miss cost a read too many, or one too few.
#[derive(Debug)]
pub(super) struct Ahead {
    size: u64,
    /// Bytes around a miss, a power of two.
    neighbourhood: u64,
    stretches: Box<[AtomicU8]>,
    /// How many stretches the last miss drew in that continued a sequence.
    depth: AtomicU32,
    /// The stretch that whoever goes in that sequence was seen in last.
    walker: AtomicUsize,
}

impl Ahead {
    /// For a file of `size` bytes on a device that reads `device` bytes ahead.
    pub(super) fn new(size: u64, device: u64) -> Self {
        let neighbourhood = device.next_power_of_two().clamp(NEIGHBOURHOODS.0, NEIGHBOURHOODS.1);
        let stretches = (0..size.div_ceil(STRETCH)).map(|_| AtomicU8::new(UNTOUCHED)).collect();
        Self { size, neighbourhood, stretches, depth: AtomicU32::new(0), walker: AtomicUsize::new(0) }
    }

    fn state(&self, stretch: usize) -> u8 {
        self.stretches[stretch].load(Ordering::Relaxed)
    }

    /// Whether the stretch around an offset has been asked for and may be under way.
    pub(super) fn is_coming(&self, offset: u64) -> bool {
        self.state((offset / STRETCH) as usize) == ASKED
    }

    /// What to read because this offset was missed; empty where it has been said before.
    pub(super) fn missed(&self, offset: u64) -> Range<u64> {
        let at = (offset / STRETCH) as usize;
        let follows = at > 0 && matches!(self.state(at - 1), ASKED | READ) && offset % STRETCH < STRETCH / 8;
        match self.state(at) {
            ASKED => 0..0,
            PARTLY => self.ask(at..at + 1),
            _ if follows || offset == 0 => {
                let depth = self.depth.load(Ordering::Relaxed).saturating_mul(2).clamp(1, DEEPEST);
                self.depth.store(depth, Ordering::Relaxed);
                self.walker.store(at, Ordering::Relaxed);
                self.ask(at..at + depth as usize)
            }
            _ => {
                let start = offset / self.neighbourhood * self.neighbourhood;
                let end = start + self.neighbourhood;
                if self.neighbourhood >= STRETCH {
                    return self.ask((start / STRETCH) as usize..(end / STRETCH) as usize);
                }
                self.stretches[at].store(PARTLY, Ordering::Relaxed);
                start..end.min(self.size)
            }
        }
    }

    /// What to read because a VM is populated from this offset on; empty where it has been said before.
    pub(super) fn populating(&self, offset: u64) -> Range<u64> {
        self.keep_ahead((offset / STRETCH) as usize)
    }

    /// What to read because this offset was touched, which may be the walker's of a sequence: the device shall not rest until he has
    /// come to the end of what was drawn in. Empty where it is not his, or all is coming.
    pub(super) fn touched(&self, offset: u64) -> Range<u64> {
        let at = (offset / STRETCH) as usize;
        let walker = self.walker.load(Ordering::Relaxed);
        // One stretch read because of one before it is no sequence yet.
        if self.depth.load(Ordering::Relaxed) < 2 || !(walker..=walker + 2).contains(&at) {
            return 0..0;
        }
        self.walker.store(at, Ordering::Relaxed);
        self.keep_ahead(at)
    }

    /// Whether there may be a walker.
    pub(super) fn has_walker(&self) -> bool {
        self.depth.load(Ordering::Relaxed) >= 2
    }

    /// The walker has not been seen for long.
    pub(super) fn lose_walker(&self) {
        self.depth.store(0, Ordering::Relaxed);
    }

    /// The first stretches among so many from one on that neither come nor have come.
    fn keep_ahead(&self, at: usize) -> Range<u64> {
        let end = (at + DEEPEST as usize).min(self.stretches.len());
        match (at..end).find(|stretch| !matches!(self.state(*stretch), ASKED | READ)) {
            Some(first) => self.ask(first..end),
            None => 0..0,
        }
    }

    /// Stretches, less those at both ends that are coming anyway.
    fn ask(&self, stretches: Range<usize>) -> Range<u64> {
        let Range { mut start, end } = stretches;
        let mut end = end.min(self.stretches.len());
        while start < end && self.state(start) == ASKED {
            start += 1;
        }
        while start < end && self.state(end - 1) == ASKED {
            end -= 1;
        }
        for stretch in &self.stretches[start..end] {
            stretch.store(ASKED, Ordering::Relaxed);
        }
        start as u64 * STRETCH..(end as u64 * STRETCH).min(self.size)
    }

    /// Something has been read, or is hole: the last of each stretch that ends in it.
    pub(super) fn read(&self, range: &Range<u64>) {
        let first = (range.start / STRETCH) as usize;
        let end = if range.end == self.size { self.stretches.len() } else { (range.end / STRETCH) as usize };
        for stretch in &self.stretches[first..end] {
            let _ = stretch.compare_exchange(ASKED, READ, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// What was read may have gone again.
    pub(super) fn forget(&self) {
        self.stretches.iter().for_each(|stretch| stretch.store(UNTOUCHED, Ordering::Relaxed));
        self.depth.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 64 << 20;

    #[test]
    fn a_lone_miss_draws_in_what_the_device_is_told_to_and_a_second_one_the_stretch() {
        let ahead = Ahead::new(SIZE, 128 << 10);
        let offset = 5 * STRETCH + (300 << 10);
        assert_eq!(ahead.missed(offset), 5 * STRETCH + (256 << 10)..5 * STRETCH + (384 << 10));
        assert_eq!(ahead.missed(offset + (1 << 20)), 5 * STRETCH..6 * STRETCH);
        assert!(ahead.is_coming(offset) && ahead.missed(offset).is_empty());
        // Read and gone again, it is a lone miss anew.
        ahead.read(&(5 * STRETCH..6 * STRETCH));
        assert!(!ahead.is_coming(offset));
        assert_eq!(ahead.missed(offset), 5 * STRETCH + (256 << 10)..5 * STRETCH + (384 << 10));
        assert_eq!(Ahead::new(SIZE, 8 << 20).missed(offset), 8 << 20..16 << 20);
    }

    #[test]
    fn every_stretch_that_ends_in_what_was_read_has_been() {
        let ahead = Ahead::new(SIZE, 0);
        assert_eq!(ahead.populating(0), 0..8 * STRETCH);
        ahead.read(&(4096..2 * STRETCH + 4096));
        let coming: Vec<bool> = (0..4).map(|stretch| ahead.is_coming(stretch * STRETCH)).collect();
        assert_eq!(coming, [false, false, true, true]);
        ahead.read(&(2 * STRETCH + 4096..SIZE));
        assert!(!(0..SIZE / STRETCH).any(|stretch| ahead.is_coming(stretch * STRETCH)));
    }

    #[test]
    fn misses_in_sequence_draw_in_ever_more_and_never_what_is_coming() {
        let ahead = Ahead::new(SIZE, 128 << 10);
        let (mut at, mut drawn) = (0, Vec::new());
        while at < SIZE {
            let range = ahead.missed(at);
            assert_eq!(range.start, at);
            drawn.push((range.end - range.start) / STRETCH);
            at = range.end;
        }
        assert_eq!(drawn, [1, 2, 4, 8, 8, 8, 1]);
    }

    #[test]
    fn a_walker_is_kept_ahead_of_and_nobody_else_is() {
        let ahead = Ahead::new(SIZE, 128 << 10);
        assert!(ahead.touched(0).is_empty(), "nobody has missed anything");
        assert_eq!((ahead.missed(0), ahead.missed(STRETCH)), (0..STRETCH, STRETCH..3 * STRETCH));
        // He goes on in what is there, and 16 MiB before him are asked for.
        assert_eq!(ahead.touched(STRETCH + 4096), 3 * STRETCH..9 * STRETCH);
        assert!(ahead.touched(STRETCH + 8192).is_empty());
        assert_eq!(ahead.touched(2 * STRETCH), 9 * STRETCH..10 * STRETCH);
        // Somebody who touches far away is another one.
        assert!(ahead.touched(20 * STRETCH).is_empty() && ahead.touched(0).is_empty());
        ahead.lose_walker();
        assert!(!ahead.has_walker() && ahead.touched(3 * STRETCH).is_empty());
    }

    #[test]
    fn population_draws_in_the_same_stretch_once_and_stays_within_the_file() {
        let ahead = Ahead::new(3 * STRETCH + 4096, 0);
        assert_eq!(ahead.populating(STRETCH), STRETCH..3 * STRETCH + 4096);
        assert!(ahead.populating(2 * STRETCH).is_empty());
        assert_eq!(ahead.missed(3 * STRETCH), 0..0);
        ahead.forget();
        assert_eq!(ahead.missed(3 * STRETCH), 3 * STRETCH..3 * STRETCH + 4096);
    }
}
