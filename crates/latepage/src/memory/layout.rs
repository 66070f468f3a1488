//! Where guest memory lies: its regions, and the look-ups between page indices, addresses and offsets.

use std::fmt;
use std::ops::Range;

use thiserror::Error;

use super::page_size::PageSize;

/// One range of guest memory: of guest-physical addresses, of addresses in the VMM, and of offsets in the snapshot, all three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Region {
    /// The guest-physical address that it starts at, in bytes; not every VMM says.
    pub gpa: Option<u64>,
    /// The address in the VMM's process that it starts at, in bytes.
    pub hva: u64,
    /// Its size in bytes.
    pub size: u64,
    /// The offset in the snapshot that it starts at, in bytes.
    pub offset: u64,
    /// The size of its pages.
    pub page_size: PageSize,
}

/// A space that a region has a range in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AddressSpace {
    /// Guest-physical addresses.
    Gpa,
    /// Addresses in the VMM's process.
    Hva,
    /// Offsets in the snapshot.
    Offset,
}

impl fmt::Display for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gpa => "guest-physical addresses",
            Self::Hva => "host-virtual addresses",
            Self::Offset => "snapshot offsets",
        })
    }
}

/// Why a list of regions is no layout. Regions are named by their place in the list, from 0.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// None at all.
    #[error("there is no region; a VM has at least one")]
    Empty,
    /// A region without bytes.
    #[error("region {region} has size 0; leave it out, or give its size in bytes")]
    ZeroSized {
        /// Which.
        region: usize,
    },
    /// A region that does not begin or end at a page.
    #[error(
        "region {region}: its {what} {value:#x} is not a multiple of its page size ({page_size}); regions begin and end at a page"
    )]
    Unaligned {
        /// Which.
        region: usize,
        /// What of it: its size, or its start in one of the spaces.
        what: &'static str,
        /// How much that is, in bytes.
        value: u64,
        /// Of its pages.
        page_size: PageSize,
    },
    /// A region that goes on past the end of 64 bits.
    #[error(
        "region {region}: its {space} start at {start:#x} and go on for {size:#x} bytes, past the end of 64 bits"
    )]
    Wraps {
        /// Which.
        region: usize,
        /// In which space.
        space: AddressSpace,
        /// Where it begins there.
        start: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// Two regions that have bytes in common.
    #[error(
        "regions {first} and {second} share {space} from {from:#x} to {to:#x}; each byte belongs to one region"
    )]
    Overlap {
        /// One of them, the earlier in the list.
        first: usize,
        /// The other one.
        second: usize,
        /// In which space.
        space: AddressSpace,
        /// The first byte that both have.
        from: u64,
        /// One past the last of that run.
        to: u64,
    },
    /// More than pages are numbered for.
    #[error("the regions have {pages} pages; a session has at most {}, so use larger pages", u32::MAX)]
    TooManyPages {
        /// How many they have.
        pages: u64,
    },
}

/// Where a page lies: the start of it in every space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// The region's place in the list, from 0.
    pub region: usize,
    /// Its address in the VMM's process, in bytes.
    pub hva: u64,
    /// Its guest-physical address in bytes, if the VMM said where its region lies.
    pub gpa: Option<u64>,
    /// Its offset in the snapshot, in bytes.
    pub offset: u64,
    /// Its size.
    pub page_size: PageSize,
}

/// The regions of a VM, checked, and the look-ups in them.
///
/// Pages are numbered region after region, in the order in which the regions were given. Every look-up takes O(log regions).
///
/// ```
/// use latepage::memory::{Layout, PageSize, Region};
///
/// let layout = Layout::new(vec![
///     Region { gpa: Some(0), hva: 0x7f00_0000_0000, size: 0x10_0000, offset: 0, page_size: PageSize::Small },
///     Region { gpa: None, hva: 0x7e00_0000_0000, size: 0x40_0000, offset: 0x20_0000, page_size: PageSize::Huge },
/// ])?;
/// assert_eq!(layout.pages(), 256 + 2);
/// assert_eq!(layout.find_hva(0x7f00_0000_1abc), Some(1));
/// assert_eq!(layout.place(257).offset, 0x40_0000);
/// # Ok::<(), latepage::memory::LayoutError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    regions: Vec<Region>,
    /// The first page of each region, and at the end the number of pages.
    first_pages: Vec<u32>,
    by_hva: Vec<Span>,
    by_gpa: Vec<Span>,
    by_offset: Vec<Span>,
}

/// A region's range in one address space, and how its pages are found from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    start: u64,
    end: u64,
    region: usize,
    first_page: u32,
    shift: u32,
}

impl Layout {
    /// Checks the regions.
    ///
    /// # Errors
    /// Where there is none, or one is of size 0, not a whole number of its pages anywhere, wraps past the end of 64 bits, or
    /// overlaps another one in any address space; or where there are more pages than an index can count.
    pub fn new(regions: Vec<Region>) -> Result<Self, LayoutError> {
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        for (index, region) in regions.iter().enumerate() {
            check_alone(index, region)?;
        }
        let first_pages = number_pages(&regions)?;
        let spans = |space| ordered_spans(&regions, &first_pages, space);
        let (by_hva, by_gpa, by_offset) =
            (spans(AddressSpace::Hva)?, spans(AddressSpace::Gpa)?, spans(AddressSpace::Offset)?);
        Ok(Self { regions, first_pages, by_hva, by_gpa, by_offset })
    }

    /// The regions, in the order in which they were given.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// How many pages there are, of either size.
    pub fn pages(&self) -> u32 {
        self.first_pages[self.regions.len()]
    }

    /// How much guest memory there is, in bytes.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.size).sum()
    }

    /// The end of the snapshot that these regions need: the highest offset plus one, in bytes.
    pub fn end(&self) -> u64 {
        self.by_offset.last().map_or(0, |span| span.end)
    }

    /// The page at this address of the VMM's process.
    pub fn find_hva(&self, hva: u64) -> Option<u32> {
        find(&self.by_hva, hva)
    }

    /// The page at this guest-physical address.
    pub fn find_gpa(&self, gpa: u64) -> Option<u32> {
        find(&self.by_gpa, gpa)
    }

    /// The page whose contents lie at this offset of the snapshot.
    pub fn find_offset(&self, offset: u64) -> Option<u32> {
        find(&self.by_offset, offset)
    }

    /// Where the page lies.
    ///
    /// # Panics
    /// Where there is no such page.
    pub fn place(&self, page: u32) -> Place {
        let index = self.region_of(page);
        let region = &self.regions[index];
        let into = u64::from(page - self.first_pages[index]) << region.page_size.shift();
        Place {
            region: index,
            hva: region.hva + into,
            gpa: region.gpa.map(|gpa| gpa + into),
            offset: region.offset + into,
            page_size: region.page_size,
        }
    }

    /// One past the last page of the page's region: a run of pages that lie side by side goes no further.
    ///
    /// # Panics
    /// Where there is no such page.
    pub fn region_end(&self, page: u32) -> u32 {
        self.first_pages[self.region_of(page) + 1]
    }

    /// The pages of a region.
    ///
    /// # Panics
    /// Where there is no such region.
    pub fn region_pages(&self, region: usize) -> Range<u32> {
        self.first_pages[region]..self.first_pages[region + 1]
    }

    /// The runs of pages that lie wholly in `start..end` of the VMM's addresses, as a REMOVE names them: one run a region, in the
    /// order of addresses.
    ///
    /// The kernel discards whole pages only, so a page that is covered in part has kept its contents.
    pub fn pages_in_hva(&self, start: u64, end: u64) -> impl Iterator<Item = Range<u32>> + '_ {
        let from = self.by_hva.partition_point(|span| span.end <= start);
        self.by_hva[from..]
            .iter()
            .take_while(move |span| span.start < end)
            .map(move |span| span.whole_pages(start, end))
            .filter(|pages| !pages.is_empty())
    }

    /// Where a run of pages lies in the VMM's process: an address and a length in bytes for each region that it has a part of.
    ///
    /// # Panics
    /// Where there are no such pages.
    pub fn ranges(&self, pages: Range<u32>) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut at = pages.start;
        std::iter::from_fn(move || {
            (at < pages.end).then(|| {
                let (place, end) = (self.place(at), self.region_end(at).min(pages.end));
                let length = u64::from(end - at) << place.page_size.shift();
                at = end;
                (place.hva, length)
            })
        })
    }

    fn region_of(&self, page: u32) -> usize {
        assert!(page < self.pages(), "page {page} of a layout of {}", self.pages());
        self.first_pages.partition_point(|first| *first <= page) - 1
    }
}

impl Span {
    fn page_at(&self, address: u64) -> u32 {
        self.first_page + ((address - self.start) >> self.shift) as u32
    }

    fn whole_pages(&self, start: u64, end: u64) -> Range<u32> {
        // Rounded up and down from the region's own start, which cannot overflow: both lie within the region.
        let (from, to) = (start.max(self.start), end.min(self.end));
        let first = (from - self.start).div_ceil(1 << self.shift) as u32;
        let last = ((to - self.start) >> self.shift) as u32;
        self.first_page + first..self.first_page + last
    }
}

fn find(spans: &[Span], address: u64) -> Option<u32> {
    let after = spans.partition_point(|span| span.start <= address);
    let span = spans[..after].last()?;
    (address < span.end).then(|| span.page_at(address))
}

/// What can be said of a region without looking at the others.
fn check_alone(index: usize, region: &Region) -> Result<(), LayoutError> {
    if region.size == 0 {
        return Err(LayoutError::ZeroSized { region: index });
    }
    let values = [
        ("size", Some(region.size)),
        ("host-virtual address", Some(region.hva)),
        ("guest-physical address", region.gpa),
        ("snapshot offset", Some(region.offset)),
    ];
    for (what, value) in values {
        if let Some(value) = value.filter(|value| !region.page_size.divides(*value)) {
            return Err(LayoutError::Unaligned { region: index, what, value, page_size: region.page_size });
        }
    }
    for space in [AddressSpace::Hva, AddressSpace::Gpa, AddressSpace::Offset] {
        if let Some(start) = region.start(space).filter(|start| start.checked_add(region.size).is_none()) {
            return Err(LayoutError::Wraps { region: index, space, start, size: region.size });
        }
    }
    Ok(())
}

/// The first page of each region, and at the end the number of pages.
fn number_pages(regions: &[Region]) -> Result<Vec<u32>, LayoutError> {
    let pages_of = |region: &Region| region.size >> region.page_size.shift();
    let pages = regions.iter().map(pages_of).fold(0, u64::saturating_add);
    let pages = u32::try_from(pages).map_err(|_| LayoutError::TooManyPages { pages })?;
    let mut first_pages = Vec::with_capacity(regions.len() + 1);
    let mut next = 0;
    for region in regions {
        first_pages.push(next);
        next += pages_of(region) as u32;
    }
    first_pages.push(pages);
    Ok(first_pages)
}

impl Region {
    fn start(&self, space: AddressSpace) -> Option<u64> {
        match space {
            AddressSpace::Gpa => self.gpa,
            AddressSpace::Hva => Some(self.hva),
            AddressSpace::Offset => Some(self.offset),
        }
    }
}

/// The regions' ranges in one address space, in order; an error where two of them overlap.
fn ordered_spans(
    regions: &[Region],
    first_pages: &[u32],
    space: AddressSpace,
) -> Result<Vec<Span>, LayoutError> {
    let mut spans: Vec<Span> = regions
        .iter()
        .zip(first_pages)
        .enumerate()
        .filter_map(|(index, (region, first_page))| {
            let start = region.start(space)?;
            Some(Span {
                start,
                end: start + region.size,
                region: index,
                first_page: *first_page,
                shift: region.page_size.shift(),
            })
        })
        .collect();
    spans.sort_by_key(|span| (span.start, span.region));
    for pair in spans.windows(2) {
        let (low, high) = (&pair[0], &pair[1]);
        if high.start < low.end {
            return Err(LayoutError::Overlap {
                first: low.region.min(high.region),
                second: low.region.max(high.region),
                space,
                from: high.start,
                to: low.end.min(high.end),
            });
        }
    }
    Ok(spans)
}
