//! Where things lie in guest-physical memory.
//!
//! ```text
//! 0 ........ 2 MiB                 the system area: what the VMM itself puts into guest memory
//! 2 MiB .... end of region 0       fingerprint pages 0, 1, 2 ...
//! end ...... 4 GiB                 the hole, where a PC has its devices (3 GiB, or less memory, below it)
//! 4 GiB .... end of region 1       fingerprint pages, numbered on
//! ```
//!
//! In the memory file and in the VMM's own address space the regions follow each other without the hole, so that offset
//! and fingerprint page say the same thing: page p is at offset 2 MiB + 4096·p.

use serde::{Deserialize, Serialize};

use crate::error::VmError;
use crate::fingerprint::PAGE;

/// Bytes of the system area, and what memory must be a multiple of.
pub const SYSTEM: u64 = 2 << 20;
/// Where the second region starts.
pub const HIGH: u64 = 4 << 30;
/// The most that the first region holds.
pub const LOW_LIMIT: u64 = 3 << 30;
/// The end of what the page tables can map, and so of guest memory.
const MAPPED: u64 = 64 << 30;

/// The guest programs.
pub(crate) const CODE: u64 = 0x1000;
#[cfg(test)]
pub(crate) const CODE_LIMIT: u64 = 0x2000;
/// Page tables: level 4, level 3, then one level 2 table for each GiB.
pub(crate) const LEVEL4: u64 = 0x8000;
pub(crate) const LEVEL3: u64 = 0x9000;
pub(crate) const LEVEL2: u64 = 0x1_0000;
/// The seed of each class of pages (u64), one page, right before the classes.
pub(crate) const SEEDS: u64 = CLASSES - PAGE;
/// The class of each page (u8), for `verify_mixed` and `verify_list`.
pub(crate) const CLASSES: u64 = 0x10_0000;
/// Pages that the table of classes can name.
pub(crate) const CLASSES_LIMIT: u64 = SYSTEM - CLASSES;
/// The list of pages (u32) of a job over given pages.
pub(crate) const LIST: u64 = 0x6_0000;
/// Entries of that list.
pub(crate) const LIST_LIMIT: u64 = (SEEDS - LIST) / 4;

/// A range of guest memory that is contiguous in all three address spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the memory file, and behind the VMM's mapping.
    pub offset: u64,
}

/// The regions of a VM's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestLayout {
    regions: Vec<Region>,
}

impl GuestLayout {
    /// Lays `bytes` of memory out: up to 3 GiB from 0, the rest from 4 GiB. `split` puts half of it there however small it is.
    ///
    /// # Errors
    /// [`VmError::Memory`] if `bytes` is no multiple of 2 MiB, less than 4 MiB, or too much.
    pub fn new(bytes: u64, split: bool) -> Result<Self, VmError> {
        let refused = |why| Err(VmError::Memory { bytes, why });
        if !bytes.is_multiple_of(SYSTEM) {
            return refused("it must be a multiple of 2 MiB");
        }
        if bytes < 2 * SYSTEM {
            return refused("it must be at least 4 MiB");
        }
        let half = (bytes / 2).next_multiple_of(SYSTEM);
        let low = if split { half } else { bytes }.min(LOW_LIMIT);
        if bytes - low > MAPPED - HIGH {
            return refused("the guest's page tables map 63 GiB at most");
        }
        let mut regions = vec![Region { gpa: 0, size: low, offset: 0 }];
        if bytes > low {
            regions.push(Region { gpa: HIGH, size: bytes - low, offset: low });
        }
        Ok(Self { regions })
    }

    /// Takes the regions of a state file back.
    pub(crate) fn from_regions(regions: Vec<Region>) -> Result<Self, String> {
        let bytes = regions.iter().map(|region| region.size).fold(0u64, u64::saturating_add);
        let expected = [false, true].map(|split| Self::new(bytes, split).map(|layout| layout.regions));
        if expected.iter().any(|known| known.as_ref().is_ok_and(|known| *known == regions)) {
            return Ok(Self { regions });
        }
        Err(format!("its regions are not laid out as this VMM lays memory out: {regions:?}"))
    }

    /// The regions, by rising address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.size).sum()
    }

    /// How many pages are fingerprinted: all but the system area.
    pub fn pages(&self) -> u64 {
        (self.bytes() - SYSTEM) / PAGE
    }

    /// Fingerprint pages of the first region.
    pub(crate) fn pages_below_hole(&self) -> u64 {
        (self.regions[0].size - SYSTEM) / PAGE
    }

    /// What is added to the address of a page in the second region.
    pub(crate) fn hole(&self) -> u64 {
        HIGH - self.regions[0].size
    }

    /// Where fingerprint page `page` lies in the memory file.
    pub fn offset_of(&self, page: u64) -> u64 {
        SYSTEM + page * PAGE
    }

    /// Where fingerprint page `page` lies for the guest.
    pub fn gpa_of(&self, page: u64) -> u64 {
        self.offset_of(page) + if page < self.pages_below_hole() { 0 } else { self.hole() }
    }

    /// The offset in the memory file of a guest-physical address, if memory is there.
    pub fn offset_of_gpa(&self, gpa: u64) -> Option<u64> {
        let region =
            self.regions.iter().find(|region| gpa >= region.gpa && gpa - region.gpa < region.size)?;
        Some(region.offset + (gpa - region.gpa))
    }

    /// The fingerprint page at a guest-physical address, if there is one.
    pub fn page_of_gpa(&self, gpa: u64) -> Option<u64> {
        Some(self.offset_of_gpa(gpa)?.checked_sub(SYSTEM)? / PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_region_and_large_memory_two() {
        assert_eq!(GuestLayout::new(64 << 20, false).unwrap().regions().len(), 1);
        let large = GuestLayout::new(5 << 30, false).unwrap();
        assert_eq!(large.regions()[0], Region { gpa: 0, size: 3 << 30, offset: 0 });
        assert_eq!(large.regions()[1], Region { gpa: 4 << 30, size: 2 << 30, offset: 3 << 30 });
        let split = GuestLayout::new(6 << 20, true).unwrap();
        assert_eq!(split.regions()[0].size, 4 << 20);
        assert_eq!(split.regions()[1], Region { gpa: HIGH, size: 2 << 20, offset: 4 << 20 });
    }

    #[test]
    fn pages_offsets_and_addresses_agree() {
        let layout = GuestLayout::new(8 << 20, true).unwrap();
        assert_eq!(layout.pages(), 6 << 8);
        for page in 0..layout.pages() {
            let gpa = layout.gpa_of(page);
            assert_eq!(layout.offset_of_gpa(gpa), Some(layout.offset_of(page)));
            assert_eq!(layout.page_of_gpa(gpa + 4095), Some(page));
        }
        assert_eq!(layout.page_of_gpa(SYSTEM - 1), None);
        assert_eq!(layout.offset_of_gpa(layout.regions()[0].size), None);
        assert_eq!(layout.offset_of_gpa(HIGH + layout.regions()[1].size), None);
    }

    #[test]
    fn odd_sizes_are_refused_and_say_why() {
        for (bytes, why) in
            [(3 << 20, "multiple of 2 MiB"), (2 << 20, "at least"), (0, "at least"), (64 << 30, "63 GiB")]
        {
            let message = GuestLayout::new(bytes, false).unwrap_err().to_string();
            assert!(message.contains(why), "{message}");
        }
        assert!(GuestLayout::new(63 << 30, false).is_ok());
    }

    #[test]
    fn regions_of_a_state_file_must_be_ours() {
        let layout = GuestLayout::new(8 << 20, true).unwrap();
        assert_eq!(GuestLayout::from_regions(layout.regions().to_vec()), Ok(layout));
        assert!(GuestLayout::from_regions(vec![]).is_err());
        assert!(GuestLayout::from_regions(vec![Region { gpa: 4096, size: 8 << 20, offset: 0 }]).is_err());
        assert!(GuestLayout::from_regions(vec![Region { gpa: 0, size: u64::MAX, offset: 0 }; 2]).is_err());
    }
}
