//! The orders in which a vCPU goes over its slice of the pages.

use serde::{Deserialize, Serialize};

use crate::fingerprint::mix;

/// In which order a job visits the pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// One after the other.
    #[default]
    Sequential,
    /// Every seventeenth page, round and round until all were visited.
    Strided,
    /// Each page once, in an order drawn from the job's seed.
    Random,
}

/// Pages from one to the next in the strided order. Odd, so that it meets every page of a power of two.
pub const STRIDE: u64 = 17;

/// An order over `count` pages as the guest walks it: `x → (x·multiplier + increment) & mask`, where step x visits
/// `x ^ (x >> shift)` unless that is `count` or more. Full period by Hull and Dobell: odd increment, multiplier 1 modulo 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Where the walk stands.
    pub at: u64,
    /// See the type.
    pub multiplier: u64,
    /// See the type.
    pub increment: u64,
    /// See the type.
    pub mask: u64,
    /// See the type.
    pub shift: u64,
    /// Pages to visit.
    pub count: u64,
    /// Steps left; a step may be one that visits nothing.
    pub steps: u64,
}

impl Walk {
    /// The walk over `count` pages.
    pub fn new(order: Order, seed: u64, count: u64) -> Self {
        if count == 0 {
            return Self { at: 0, multiplier: 1, increment: 1, mask: 0, shift: 63, count, steps: 0 };
        }
        let steps = count.next_power_of_two();
        let mask = steps - 1;
        let plain = Self { at: 0, multiplier: 1, increment: 1, mask, shift: 63, count, steps };
        match order {
            Order::Sequential => plain,
            Order::Strided => Self { increment: STRIDE, ..plain },
            Order::Random => Self {
                at: mix(seed) & mask,
                multiplier: (mix(seed ^ 1) << 2 | 1) & mask | 1,
                increment: mix(seed ^ 2) & mask | 1,
                shift: u64::from(steps.trailing_zeros()).div_ceil(2).max(1),
                ..plain
            },
        }
    }
}

impl Iterator for Walk {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        while self.steps > 0 {
            self.steps -= 1;
            let visited = self.at ^ (self.at >> self.shift);
            self.at = self.at.wrapping_mul(self.multiplier).wrapping_add(self.increment) & self.mask;
            if visited < self.count {
                return Some(visited);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_visits_every_page_once() {
        for order in [Order::Sequential, Order::Strided, Order::Random] {
            for count in [0, 1, 2, 3, 4, 5, 17, 255, 256, 257, 1000, 4096, 65_535] {
                for seed in 0..5 {
                    let mut visited: Vec<u64> = Walk::new(order, seed, count).collect();
                    visited.sort_unstable();
                    assert_eq!(visited, (0..count).collect::<Vec<_>>(), "{order:?} over {count} pages");
                }
            }
        }
    }

    #[test]
    fn random_is_neither_sequential_nor_the_same_for_every_seed() {
        let walk = |seed| Walk::new(Order::Random, seed, 4096).collect::<Vec<_>>();
        assert_ne!(walk(1), walk(2));
        let neighbours = walk(1).windows(2).filter(|pair| pair[1] == pair[0] + 1).count();
        assert!(neighbours < 100, "{neighbours} of 4095 steps go to the next page");
    }
}
