//! Firecracker's page-fault-handler protocol: an array of regions, and one descriptor.
//!
//! The regions are its `GuestRegionUffdMapping` (`src/vmm/src/persist.rs`), in the three shapes that it has had since 1.1:
//! without a page size, with `page_size_kib` (whose value is in bytes), and with `page_size`. There is no version and no
//! reply; unknown keys are ignored, since later releases may add some.

use serde::{Deserialize, Serialize};

use crate::memory::{Layout, PageSize, Region};

use super::refusal::{RefusalReason, one_line};
use super::{Backing, Form};

/// What a region's page size is where the VMM does not say: Firecracker before 1.7 had no other.
const DEFAULT_PAGE_SIZE: u64 = 4096;

/// One region, as Firecracker writes it.
#[derive(Debug, Serialize, Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    #[serde(default)]
    page_size: Option<u64>,
    /// Bytes, whatever its name says (Firecracker's own note on it).
    #[serde(default)]
    page_size_kib: Option<u64>,
    /// Not on Firecracker's main branch: its secret-free branch has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gpa_start: Option<u64>,
}

/// The message that Firecracker sends for a VM with this layout. Its userfaultfd goes with it.
pub fn message(layout: &Layout) -> String {
    let mappings: Vec<Mapping> = layout
        .regions()
        .iter()
        .map(|region| Mapping {
            base_host_virt_addr: region.hva,
            size: region.size,
            offset: region.offset,
            page_size: Some(region.page_size.bytes()),
            page_size_kib: Some(region.page_size.bytes()),
            gpa_start: None,
        })
        .collect();
    serde_json::to_string(&mappings).expect("numbers always serialize")
}

/// Reads the document, once it is whole.
pub(super) fn parse(body: &[u8]) -> Result<Layout, RefusalReason> {
    let mappings: Vec<Mapping> = serde_json::from_slice(body).map_err(|error| RefusalReason::Malformed {
        form: Form::Firecracker,
        message: one_line(&error.to_string()),
    })?;
    // A GPA is of use only if every region has one.
    let with_gpa = mappings.iter().all(|mapping| mapping.gpa_start.is_some());
    let regions = mappings
        .into_iter()
        .map(|mapping| {
            let bytes = mapping.page_size.or(mapping.page_size_kib).unwrap_or(DEFAULT_PAGE_SIZE);
            Ok(Region {
                gpa: mapping.gpa_start.filter(|_| with_gpa),
                hva: mapping.base_host_virt_addr,
                size: mapping.size,
                offset: mapping.offset,
                page_size: page_size(bytes)?,
            })
        })
        .collect::<Result<_, RefusalReason>>()?;
    Ok(Layout::new(regions)?)
}

/// What the guest's memory is made of. Firecracker restores into anonymous memory, or into hugetlb pages.
pub(super) fn backing(layout: &Layout) -> Backing {
    if layout.regions().iter().any(|region| region.page_size == PageSize::Huge) {
        Backing::Hugetlb
    } else {
        Backing::Anonymous
    }
}

/// A page size in bytes, as either form has it.
pub(super) fn page_size(bytes: u64) -> Result<PageSize, RefusalReason> {
    PageSize::from_bytes(bytes).ok_or_else(|| RefusalReason::Value {
        key: "page_size",
        value: bytes.to_string(),
        known: "4096 and 2097152 are (in bytes)",
    })
}
