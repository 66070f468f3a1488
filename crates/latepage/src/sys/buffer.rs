//! Private memory that takes none of the machine's before it is written to.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags};

/// Zero bytes from a page's start on, straight from the kernel: a thread that never writes to its buffer costs only its addresses.
#[derive(Debug)]
pub struct Buffer {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory belongs to this value alone, and is reached through borrows of it.
unsafe impl Send for Buffer {}
// SAFETY: as for Send.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Of so many bytes, one at least. Where there are no addresses left it ends the process, as an allocation does.
    pub fn new(length: usize) -> Self {
        let length = length.max(1);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is given, so nothing that exists is mapped over.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        };
        match mapped.ok().and_then(|base| NonNull::new(base.cast())) {
            Some(base) => Self { base, length },
            None => handle_alloc_error(Layout::array::<u8>(length).unwrap_or(Layout::new::<u8>())),
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped for so many bytes for as long as `self` lives, all of them zero or written through `deref_mut`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.length) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.length) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no borrow of it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_zero_and_holds_what_is_written() {
        let mut buffer = Buffer::new(64 << 10);
        assert!(buffer.len() == 64 << 10 && buffer.iter().all(|byte| *byte == 0));
        buffer[4095..4097].copy_from_slice(&[7, 8]);
        assert_eq!(buffer[4094..4098], [0, 7, 8, 0]);
        assert_eq!(Buffer::new(0).len(), 1);
    }
}
