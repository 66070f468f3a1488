//! One bit for each of many things in order, read and changed by any thread.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bits, all clear at first. Each is changed atomically, a range of them is not.
#[derive(Debug)]
pub(crate) struct Bitmap {
    words: Box<[AtomicU64]>,
    bits: usize,
}

impl Bitmap {
    pub(crate) fn new(bits: usize) -> Self {
        Self { words: (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), bits }
    }

    /// How many bits are set.
    pub(crate) fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }

    /// How many words of 64 bits they take.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }

    /// Those bits of the last word that stand for something.
    pub(crate) fn last_word(&self) -> u64 {
        u64::MAX >> (self.words.len() * 64 - self.bits)
    }

    /// The bits, 64 a word, the first in the lowest.
    pub(crate) fn to_words(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// Sets what is set in as many words.
    pub(crate) fn merge(&self, words: &[u64]) {
        for (word, more) in self.words.iter().zip(words) {
            word.fetch_or(*more, Ordering::Release);
        }
    }

    /// Sets a range, or clears it. What was written before a bit was set is seen by whoever sees the bit.
    ///
    /// # Panics
    /// If the range goes beyond the last bit.
    pub(crate) fn fill(&self, range: Range<usize>, value: bool) {
        assert!(range.end <= self.bits, "{range:?} of {} bits", self.bits);
        let mut at = range.start;
        while at < range.end {
            let (word, from) = (at / 64, at % 64);
            let count = (64 - from).min(range.end - at);
            let mask = (u64::MAX >> (64 - count)) << from;
            if value {
                self.words[word].fetch_or(mask, Ordering::Release);
            } else {
                self.words[word].fetch_and(!mask, Ordering::Release);
            }
            at += count;
        }
    }

    /// Where the bits that are `value` end, which begin at the start of the range: its start if the first is not, its end if all are.
    pub(crate) fn run(&self, range: Range<usize>, value: bool) -> usize {
        let end = range.end.min(self.bits);
        let mut at = range.start;
        while at < end {
            let bits = self.words[at / 64].load(Ordering::Acquire) >> (at % 64);
            let same = if value { bits.trailing_ones() } else { bits.trailing_zeros() } as usize;
            // Behind the end of a word there are none, which counts as clear.
            let same = same.min(64 - at % 64);
            at += same;
            if same == 0 || !at.is_multiple_of(64) {
                break;
            }
        }
        at.min(end).max(range.start)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bitmap_is_a_row_of_booleans(
            fills in prop::collection::vec((0..300_usize, 0..300_usize, any::<bool>()), 0..12),
            asked in (0..300_usize, 0..300_usize, any::<bool>()),
        ) {
            let (bitmap, mut row) = (Bitmap::new(300), vec![false; 300]);
            for (one, other, value) in fills {
                let range = one.min(other)..one.max(other);
                bitmap.fill(range.clone(), value);
                row[range].fill(value);
            }
            let (one, other, value) = asked;
            let range = one.min(other)..one.max(other);
            let run = row[range.clone()].iter().take_while(|bit| **bit == value).count();
            prop_assert_eq!(bitmap.run(range.clone(), value), range.start + run);
        }
    }
}
