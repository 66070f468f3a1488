//! What the guest's memory is: its page sizes, its regions and where each page lies in them, and what has become of each page.
//!
//! Nothing in here does I/O or knows of a kernel interface, but for the file of a table that outlives its pager ([`PageTable`]).
//! `docs/memory.md` and `docs/pages.md` say the same in prose.

pub(crate) mod atomic;
#[cfg(not(loom))]
mod bitmap;
mod layout;
mod page_size;
mod pages;
mod shards;
#[cfg(not(loom))]
mod table;
mod transitions;

#[cfg(not(loom))]
pub(crate) use bitmap::Bitmap;
pub use layout::{AddressSpace, Layout, LayoutError, Place, Region};
pub use page_size::PageSize;
pub use pages::Pages;
pub use shards::{Shards, ShardsError};
#[cfg(not(loom))]
pub use table::{PageTable, PageTableError};
pub use transitions::{Claim, PageState, STATES, STEPS, Step, TRANSITIONS};

#[cfg(all(test, not(loom)))]
mod properties;
#[cfg(all(test, loom))]
mod races;
#[cfg(all(test, loom))]
mod successors;
