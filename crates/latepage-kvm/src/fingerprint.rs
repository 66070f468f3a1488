//! What a page of the guest holds: eight words placed by a seed, the rest zero.
//!
//! `guest/programs.s` computes the same in the guest. The first and the last word of the page and six between, one in each
//! band of 85 words, so that they never meet. Every step maps zero to zero and nothing else there: the seed "none" gives
//! eight zero words, which is what a discarded page holds, and any other seed gives none.

/// Bytes of a fingerprinted page, whatever the size of the pages behind it.
pub const PAGE: u64 = 4096;
/// Words of eight bytes in a page.
pub const WORDS: usize = 512;

const FIRST: u64 = 0x2545_F491;
const NEXT: u64 = 0x7FEB_352D;
const BAND: u64 = 85;

/// The odd number that the guest multiplies with, for a seed as the user gives it. Never zero.
pub fn spread(seed: u64) -> u64 {
    mix(seed) | 1
}

/// The finalizer of splitmix64 (Steele, Lea, Flood 2014): every bit of the seed reaches every bit of the result.
pub(crate) fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The eight words of page number `page`: (index of the word in the page, its value). `spread_seed` is [`spread`] of the seed, or
/// 0 for a page of zeros.
pub fn words(spread_seed: u64, page: u64) -> [(usize, u64); 8] {
    let mut value = (page + 1).wrapping_mul(spread_seed);
    value ^= value >> 32;
    value = value.wrapping_mul(FIRST);
    let mut words = [(0, value); 8];
    for (band, word) in (0..6).zip(&mut words[1..7]) {
        value = value.wrapping_mul(NEXT);
        *word = ((1 + BAND * band + (value >> 58)) as usize, value);
    }
    words[7] = (WORDS - 1, value.wrapping_mul(NEXT));
    words
}

/// The whole page after the fills of `seeds`, in their order, over zeros.
pub fn render(seeds: &[u64], page: u64, into: &mut [u64; WORDS]) {
    into.fill(0);
    for &seed in seeds {
        for (at, value) in words(spread(seed), page) {
            into[at] = value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn words_never_meet_and_never_are_zero() {
        for seed in [0, 1, 7, u64::MAX] {
            for page in (0..2000).chain([1 << 20, (1 << 24) - 1]) {
                let words = words(spread(seed), page);
                let places: HashSet<usize> = words.iter().map(|word| word.0).collect();
                assert_eq!(places.len(), 8);
                assert_eq!((words[0].0, words[7].0), (0, 511));
                assert!(words.iter().all(|word| word.0 < WORDS && word.1 != 0));
            }
        }
    }

    #[test]
    fn no_seed_means_zero() {
        assert!(words(0, 12345).iter().all(|word| word.1 == 0));
    }

    #[test]
    fn pages_and_seeds_differ() {
        let first = |seed, page| words(spread(seed), page)[0].1;
        let values: HashSet<u64> =
            (0..50).flat_map(|seed| (0..200).map(move |page| first(seed, page))).collect();
        assert_eq!(values.len(), 50 * 200);
    }

    #[test]
    fn a_later_fill_lies_over_an_earlier_one() {
        let mut page = [0; WORDS];
        render(&[3, 4], 9, &mut page);
        for (at, value) in words(spread(4), 9) {
            assert_eq!(page[at], value);
        }
        assert!(page.iter().filter(|word| **word != 0).count() > 8);
    }
}
