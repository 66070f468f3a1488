//! How guest memory is divided where a VM has several userfaultfds: each is over a shard of its own.

use std::ops::Range;

use thiserror::Error;

use super::layout::Layout;
use super::page_size::PageSize;

/// Why memory cannot be divided so. Shards are named by their place in the list, from 0.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ShardsError {
    /// None, or too many.
    #[error("{shards} shards; a VM has 1 to {}", Shards::MOST)]
    Count {
        /// How many were asked for.
        shards: usize,
    },
    /// One would be empty.
    #[error("{shards} shards for {pages} pages: each has one page at least, so ask for {pages} at most")]
    MoreThanPages {
        /// How many were asked for.
        shards: usize,
        /// Pages of the layout.
        pages: u32,
    },
    /// One is empty.
    #[error("shard {shard} has size 0: no memory would be its userfaultfd's; leave both out")]
    ZeroSized {
        /// Which.
        shard: usize,
    },
    /// A page would belong to two.
    #[error(
        "shard {shard} ends {end:#x} bytes into the regions, inside a page ({page_size}); shards end where a page does"
    )]
    Unaligned {
        /// The first of the two.
        shard: usize,
        /// Where it ends, in bytes from the start of the first region through all of them.
        end: u64,
        /// The size of that page.
        page_size: PageSize,
    },
    /// They are longer than the layout.
    #[error("shard {shard} goes beyond the regions, which have {bytes:#x} bytes in all")]
    Beyond {
        /// The first that does.
        shard: usize,
        /// Bytes of the layout.
        bytes: u64,
    },
    /// They are shorter than the layout.
    #[error(
        "the shards end {end:#x} bytes into the regions, which have {bytes:#x}: the rest is no userfaultfd's"
    )]
    Short {
        /// Where the last one ends, in bytes.
        end: u64,
        /// Bytes of the layout.
        bytes: u64,
    },
}

/// The shards of a layout: runs of pages, one behind the other, that have all of its pages. Each ends where a page does, in the middle
/// of a region or behind several.
///
/// ```
/// use latepage::memory::{Layout, PageSize, Region, Shards};
///
/// let region = |hva, offset| Region { gpa: None, hva, size: 0x6000, offset, page_size: PageSize::Small };
/// let layout = Layout::new(vec![region(0x10_0000, 0), region(0x40_0000, 0x6000)])?;
/// let shards = Shards::equal(&layout, 3)?;
/// assert_eq!(shards.pages(1), 4..8);
/// // The second shard is the end of the first region and the beginning of the other one.
/// assert_eq!(shards.ranges(&layout, 1).collect::<Vec<_>>(), [(0x10_4000, 0x2000), (0x40_0000, 0x2000)]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shards {
    /// One past the last page of each.
    ends: Vec<u32>,
}

impl Shards {
    /// The most that a VM has.
    pub const MOST: usize = 64;

    /// All of the memory, undivided.
    pub fn whole(layout: &Layout) -> Self {
        Self { ends: vec![layout.pages()] }
    }

    /// So many shards of as many pages each, as nearly as it goes.
    ///
    /// # Errors
    /// Where there are none, more than [`MOST`](Self::MOST), or more than pages.
    pub fn equal(layout: &Layout, shards: usize) -> Result<Self, ShardsError> {
        if !(1..=Self::MOST).contains(&shards) {
            return Err(ShardsError::Count { shards });
        }
        let pages = layout.pages();
        if shards > pages as usize {
            return Err(ShardsError::MoreThanPages { shards, pages });
        }
        let end = |shard: usize| (u64::from(pages) * (shard as u64 + 1) / shards as u64) as u32;
        Ok(Self { ends: (0..shards).map(end).collect() })
    }

    /// Shards of these sizes in bytes, through the regions in their order.
    ///
    /// # Errors
    /// Where there are none, or more than [`MOST`](Self::MOST); where one is empty, ends inside a page or beyond the regions; where
    /// they do not have all of the regions.
    pub fn of_sizes(layout: &Layout, sizes: &[u64]) -> Result<Self, ShardsError> {
        if !(1..=Self::MOST).contains(&sizes.len()) {
            return Err(ShardsError::Count { shards: sizes.len() });
        }
        let bytes = layout.bytes();
        let (mut end, mut ends) = (0_u64, Vec::with_capacity(sizes.len()));
        for (shard, size) in sizes.iter().enumerate() {
            if *size == 0 {
                return Err(ShardsError::ZeroSized { shard });
            }
            end = end
                .checked_add(*size)
                .filter(|end| *end <= bytes)
                .ok_or(ShardsError::Beyond { shard, bytes })?;
            ends.push(page_that_ends(layout, shard, end)?);
        }
        if end < bytes {
            return Err(ShardsError::Short { end, bytes });
        }
        Ok(Self { ends })
    }

    /// How many there are; one at least.
    #[allow(clippy::len_without_is_empty, reason = "there is always one")]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// The pages of a shard.
    ///
    /// # Panics
    /// Where there is no such shard.
    pub fn pages(&self, shard: usize) -> Range<u32> {
        shard.checked_sub(1).map_or(0, |before| self.ends[before])..self.ends[shard]
    }

    /// The shard that a page belongs to. Takes O(log shards), and nothing where there is one.
    #[inline]
    pub fn of(&self, page: u32) -> usize {
        match self.ends.len() {
            1 => 0,
            _ => self.ends.partition_point(|end| *end <= page),
        }
    }

    /// How large a shard is, in bytes.
    ///
    /// # Panics
    /// Where there is no such shard.
    pub fn bytes(&self, layout: &Layout, shard: usize) -> u64 {
        self.ranges(layout, shard).map(|(_, length)| length).sum()
    }

    /// Where a shard lies in the VMM's process: an address and a length in bytes for each region that it has a part of.
    ///
    /// # Panics
    /// Where there is no such shard.
    pub fn ranges<'a>(&self, layout: &'a Layout, shard: usize) -> impl Iterator<Item = (u64, u64)> + use<'a> {
        layout.ranges(self.pages(shard))
    }
}

/// One past the page that ends so many bytes into the regions.
fn page_that_ends(layout: &Layout, shard: usize, end: u64) -> Result<u32, ShardsError> {
    let mut before = 0;
    for (index, region) in layout.regions().iter().enumerate() {
        let into = end - before;
        if into <= region.size {
            let page_size = region.page_size;
            if !into.is_multiple_of(page_size.bytes()) {
                return Err(ShardsError::Unaligned { shard, end, page_size });
            }
            return Ok(layout.region_pages(index).start + (into / page_size.bytes()) as u32);
        }
        before += region.size;
    }
    unreachable!("the regions go further than {end:#x}")
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::memory::Region;

    /// Regions of 3 and 5 pages, the second one at the lower address.
    fn layout(page_size: PageSize) -> Layout {
        let bytes = page_size.bytes();
        let region = |hva, pages, offset| Region { gpa: None, hva, size: pages * bytes, offset, page_size };
        Layout::new(vec![region(1 << 40, 3, 0), region(1 << 30, 5, 3 * bytes)]).unwrap()
    }

    fn all(shards: &Shards) -> Vec<Range<u32>> {
        (0..shards.len()).map(|shard| shards.pages(shard)).collect()
    }

    #[test]
    fn equal_shards_have_every_page_once() {
        let layout = layout(PageSize::Small);
        for count in 1..=8 {
            let shards = Shards::equal(&layout, count).unwrap();
            let all = all(&shards);
            assert_eq!((all.len(), all[0].start, all[count - 1].end), (count, 0, 8));
            for page in 0..8 {
                assert!(all[shards.of(page)].contains(&page), "{count} shards, page {page}");
            }
            let sizes: Vec<u64> = (0..count).map(|shard| shards.bytes(&layout, shard)).collect();
            assert!(sizes.iter().all(|size| *size >= 4096 && sizes.iter().sum::<u64>() == 8 * 4096));
            assert_eq!(Shards::of_sizes(&layout, &sizes), Ok(shards));
        }
        assert_eq!(Shards::equal(&layout, 1), Ok(Shards::whole(&layout)));
    }

    #[test]
    fn a_shard_lies_where_its_regions_do() {
        let layout = layout(PageSize::Huge);
        let huge = PageSize::Huge.bytes();
        let shards = Shards::of_sizes(&layout, &[2 * huge, 2 * huge, 4 * huge]).unwrap();
        let lies = |shard| shards.ranges(&layout, shard).collect::<Vec<_>>();
        assert_eq!(lies(0), [(1 << 40, 2 * huge)]);
        assert_eq!(lies(1), [((1 << 40) + 2 * huge, huge), (1 << 30, huge)]);
        assert_eq!(lies(2), [((1 << 30) + huge, 4 * huge)]);
    }

    #[test]
    fn what_is_no_division_is_refused_in_words() {
        let small = layout(PageSize::Small);
        let why = |sizes: &[u64]| Shards::of_sizes(&small, sizes).unwrap_err().to_string();
        assert_eq!(why(&[]), "0 shards; a VM has 1 to 64");
        assert_eq!(why(&[1; 65]), "65 shards; a VM has 1 to 64");
        assert_eq!(
            why(&[0x2000, 0, 0x6000]),
            "shard 1 has size 0: no memory would be its userfaultfd's; leave both out"
        );
        assert_eq!(
            why(&[0x2000, 0x5800, 0x800]),
            "shard 1 ends 0x7800 bytes into the regions, inside a page (4 KiB); shards end where a page does"
        );
        let beyond = "shard 1 goes beyond the regions, which have 0x8000 bytes in all";
        assert_eq!(why(&[0x8000, 0x1000]), beyond);
        assert_eq!(why(&[0x1000, u64::MAX]), beyond);
        assert_eq!(
            why(&[0x1000, 0x1000]),
            "the shards end 0x2000 bytes into the regions, which have 0x8000: the rest is no userfaultfd's"
        );
        let huge = layout(PageSize::Huge);
        assert!(matches!(
            Shards::of_sizes(&huge, &[3 << 20, 13 << 20]),
            Err(ShardsError::Unaligned { shard: 0, .. })
        ));
        let equal = |count| Shards::equal(&small, count).unwrap_err().to_string();
        assert_eq!(equal(0), "0 shards; a VM has 1 to 64");
        assert_eq!(equal(65), "65 shards; a VM has 1 to 64");
        assert_eq!(equal(9), "9 shards for 8 pages: each has one page at least, so ask for 8 at most");
    }
}
