//! The guest programs, assembled with the crate (`guest/programs.s`).

use std::arch::global_asm;
use std::slice;

global_asm!(include_str!("../guest/programs.s"));

unsafe extern "C" {
    safe static latepage_guest_start: u8;
    safe static latepage_guest_end: u8;
}

/// The assembled programs: a table of their starts (u32, one each), then the code.
pub(crate) fn blob() -> &'static [u8] {
    let start = &raw const latepage_guest_start;
    let length = (&raw const latepage_guest_end).addr() - start.addr();
    // SAFETY: both symbols are labels in one read-only section of this very object, `start` first, so the bytes between
    // them are one initialised allocation that lives as long as the program and is never written.
    unsafe { slice::from_raw_parts(start, length) }
}
