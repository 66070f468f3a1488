//! What runs inside the VM: the programs, their registers, and the orders in which they visit pages.

pub(crate) mod order;
pub(crate) mod registers;
pub(crate) mod standin;
pub(crate) mod system;

use crate::layout::CODE;
use crate::sys::guest_code;

/// Ports that the programs write to (`programs.s`).
pub(crate) mod port {
    /// The first sign of life.
    pub(crate) const HELLO: u16 = 0xE0;
    /// 256 pages more, or 65,536 counted.
    pub(crate) const PROGRESS: u16 = 0xE1;
    /// The page at rdi is not what it should be.
    pub(crate) const WRONG: u16 = 0xE2;
    /// This vCPU's slice is done.
    pub(crate) const DONE: u16 = 0xE3;
    /// The first byte of the page at rdi, put out by a string instruction.
    pub(crate) const SAID: u16 = 0xE4;
}

/// The programs, in the order of the table at the start of the blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    Hello,
    Fill,
    FillList,
    Verify,
    VerifyMixed,
    VerifyList,
    Touch,
    TouchList,
    Say,
    SayList,
    Count,
}

impl Program {
    const ALL: [Self; 11] = [
        Self::Hello,
        Self::Fill,
        Self::FillList,
        Self::Verify,
        Self::VerifyMixed,
        Self::VerifyList,
        Self::Touch,
        Self::TouchList,
        Self::Say,
        Self::SayList,
        Self::Count,
    ];

    /// The address of its first instruction.
    pub(crate) fn entry(self) -> u64 {
        let row = self as usize * 4;
        let start: [u8; 4] = guest_code::blob()[row..row + 4].try_into().expect("four bytes are four bytes");
        CODE + u64::from(u32::from_le_bytes(start))
    }

    /// The program that starts at `rip`.
    pub(crate) fn at(rip: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|program| program.entry() == rip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::CODE_LIMIT;

    #[test]
    fn programs_fit_their_place_and_start_where_the_table_says() {
        let blob = guest_code::blob();
        assert!(blob.len() as u64 <= CODE_LIMIT, "{} bytes of guest code", blob.len());
        let entries = Program::ALL.map(Program::entry);
        assert!(entries.is_sorted() && entries[0] >= CODE + 4 * 11, "{entries:x?}");
        assert_eq!(Program::at(Program::Touch.entry()), Some(Program::Touch));
        assert_eq!(Program::at(Program::Touch.entry() + 1), None);
    }
}
