//! The registers of a vCPU: all that a running program is made of.

use serde::{Deserialize, Serialize};

use super::Program;
use super::order::Walk;
use crate::layout::{CLASSES, GuestLayout, LIST};

/// General registers, named as in the processor's manual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Registers {
    pub(crate) rax: u64,
    pub(crate) rbx: u64,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    pub(crate) rsi: u64,
    pub(crate) rdi: u64,
    pub(crate) rsp: u64,
    pub(crate) rbp: u64,
    pub(crate) r8: u64,
    pub(crate) r9: u64,
    pub(crate) r10: u64,
    pub(crate) r11: u64,
    pub(crate) r12: u64,
    pub(crate) r13: u64,
    pub(crate) r14: u64,
    pub(crate) r15: u64,
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
}

/// Bit 1 of rflags is always set; interrupts stay off.
const RFLAGS: u64 = 2;

impl Registers {
    /// A program without arguments.
    pub(crate) fn plain(program: Program) -> Self {
        Self { rip: program.entry(), rflags: RFLAGS, ..Self::default() }
    }

    fn over(program: Program, layout: &GuestLayout, spread_seed: u64) -> Self {
        Self {
            rsi: layout.pages_below_hole(),
            rdx: layout.hole(),
            rsp: CLASSES,
            r14: spread_seed,
            ..Self::plain(program)
        }
    }

    /// A program over the slice of pages that starts at `first`, in the order of `walk`.
    pub(crate) fn walking(
        program: Program,
        layout: &GuestLayout,
        spread_seed: u64,
        first: u64,
        walk: &Walk,
    ) -> Self {
        Self {
            r8: walk.at,
            r9: walk.multiplier,
            r10: walk.increment,
            r11: walk.mask,
            rcx: walk.shift,
            r12: walk.count,
            r13: walk.steps,
            r15: first,
            ..Self::over(program, layout, spread_seed)
        }
    }

    /// A program over `count` entries of the list, from entry `first`.
    pub(crate) fn listed(
        program: Program,
        layout: &GuestLayout,
        spread_seed: u64,
        first: u64,
        count: u64,
    ) -> Self {
        Self { r9: LIST + 4 * first, r12: count, ..Self::over(program, layout, spread_seed) }
    }

    /// The walk as far as it has come.
    pub(crate) fn walk(&self) -> Walk {
        Walk {
            at: self.r8,
            multiplier: self.r9,
            increment: self.r10,
            mask: self.r11,
            shift: self.rcx & 63,
            count: self.r12,
            steps: self.r13,
        }
    }

    /// Puts a walk back.
    pub(crate) fn set_walk(&mut self, walk: &Walk) {
        self.r8 = walk.at;
        self.r13 = walk.steps;
    }
}
