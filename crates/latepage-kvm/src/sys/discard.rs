//! Putting zero memory in the place of a part of a private file mapping.

use std::ffi::c_void;

use latepage::sys::mapping::Mapping;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Maps anonymous memory over a range: MADV_DONTNEED on a private mapping of a file would bring the file's page back.
///
/// # Errors
/// The errno of mmap(2).
///
/// # Panics
/// If the range is outside the mapping.
pub(crate) fn map_zero_over(mapping: &Mapping, offset: u64, length: u64) -> Result<(), Errno> {
    assert!(
        offset.checked_add(length).is_some_and(|end| end <= mapping.len() as u64),
        "discard outside guest memory"
    );
    let start = (mapping.address() + offset) as *mut c_void;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the range lies inside a mapping of ours (checked), which is only reached through copies and atomics, so that
    // nothing holds a reference into what is replaced; it stays mapped, readable and writable throughout.
    unsafe { rustix::mm::mmap_anonymous(start, length as usize, ProtFlags::READ | ProtFlags::WRITE, flags) }
        .map(drop)
}
