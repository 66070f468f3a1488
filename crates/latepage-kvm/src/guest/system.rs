//! What the VMM puts into the system area before a guest starts: the programs and the page tables.

use crate::fingerprint::PAGE;
use crate::layout::{CODE, GuestLayout, LEVEL2, LEVEL3, LEVEL4};
use crate::sys::guest_code;

/// Present, writable; accessed and dirty too, so that the processor never writes to the tables by itself.
const TABLE: u64 = 0x23;
const LEAF: u64 = 0x63 | LARGE;
/// A leaf of 2 MiB.
const LARGE: u64 = 0x80;
const GIB: u64 = 1 << 30;

/// The pages of the system area that are not zero, as (guest-physical address, bytes), whole pages each.
pub(crate) fn pages(layout: &GuestLayout) -> Vec<(u64, Vec<u8>)> {
    let mut code = guest_code::blob().to_vec();
    code.resize(code.len().next_multiple_of(PAGE as usize), 0);
    let gibs: Vec<u64> = layout
        .regions()
        .iter()
        .flat_map(|region| region.gpa / GIB..(region.gpa + region.size).div_ceil(GIB))
        .collect();
    let level2 = |gib: u64| LEVEL2 + gib * PAGE;
    let mut pages = vec![
        (CODE, code),
        (LEVEL4, table([(0, LEVEL3 | TABLE)])),
        (LEVEL3, table(gibs.iter().map(|gib| (*gib, level2(*gib) | TABLE)))),
    ];
    for gib in gibs {
        pages.push((level2(gib), table((0..512).map(|row| (row, (gib * GIB + (row << 21)) | LEAF)))));
    }
    pages
}

fn table(rows: impl IntoIterator<Item = (u64, u64)>) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    for (row, entry) in rows {
        let at = row as usize * 8;
        bytes[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
    bytes
}

/// Names the guest programs of this build: a state saved with others cannot be continued, since its code lies in guest memory.
pub(crate) fn identity() -> u64 {
    digest(guest_code::blob())
}

/// A hash of a page's bytes, good against accidents (FNV-1a over words of eight bytes, finalized).
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    let mut state = 0xCBF2_9CE4_8422_2325u64;
    for word in bytes.chunks(8) {
        let mut padded = [0; 8];
        padded[..word.len()].copy_from_slice(word);
        state = (state ^ u64::from_le_bytes(padded)).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(23);
    }
    crate::fingerprint::mix(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{LIST, SYSTEM};

    #[test]
    fn tables_stay_clear_of_the_list_whatever_the_memory() {
        for bytes in [4 << 20, 3 << 30, 63 << 30] {
            let layout = GuestLayout::new(bytes, false).unwrap();
            for (gpa, bytes) in pages(&layout) {
                assert!(gpa + bytes.len() as u64 <= LIST && LIST < SYSTEM, "{gpa:#x}");
                assert_eq!(bytes.len() % PAGE as usize, 0);
            }
        }
    }
}
