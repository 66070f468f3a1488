//! Memory slots: which of the VMM's memory the guest sees where.

use std::fmt;
use std::sync::Arc;

use kvm_bindings::{kvm_userspace_memory_region, kvm_userspace_memory_region2};
use kvm_ioctls::VmFd;
use latepage::install::PageBitmap;

use crate::error::VmError;
use crate::memory::GuestMemory;

/// `KVM_MEM_USERFAULT` of the patches that bring KVM Userfault; no released kernel has it.
pub(crate) const KVM_MEM_USERFAULT: u32 = 1 << 3;

/// A VM descriptor together with the memory that its slots point into.
///
/// Fields drop in their order: the descriptor goes first. vCPUs hold references to the VM in the kernel and to this.
#[derive(Debug)]
pub(crate) struct Slots {
    pub(crate) vm: VmFd,
    memory: Arc<GuestMemory>,
    bitmap: Option<Arc<PageBitmap>>,
}

impl Slots {
    /// Gives every region of `memory` to the guest, with its part of the bitmap where there is one.
    pub(crate) fn new(
        vm: VmFd,
        memory: Arc<GuestMemory>,
        bitmap: Option<Arc<PageBitmap>>,
    ) -> Result<Self, VmError> {
        let slots = Self { vm, memory, bitmap };
        for (number, region) in slots.memory.layout().regions().iter().enumerate() {
            let userspace_addr = slots.memory.hva() + region.offset;
            if let Some(bitmap) = &slots.bitmap {
                let mut slot = kvm_userspace_memory_region2 {
                    slot: number as u32,
                    flags: KVM_MEM_USERFAULT,
                    guest_phys_addr: region.gpa,
                    memory_size: region.size,
                    userspace_addr,
                    ..Default::default()
                };
                // The bitmap's address is the first of the reserved words.
                slot.pad2[0] = bitmap.address(number);
                // SAFETY: as below; KVM only reads the bitmap, which this value keeps mapped, too.
                unsafe { slots.vm.set_user_memory_region2(slot) }.map_err(|errno| {
                    VmError::kvm("KVM_SET_USER_MEMORY_REGION2 (KVM_MEM_USERFAULT)", errno)
                })?;
                continue;
            }
            let slot = kvm_userspace_memory_region {
                slot: number as u32,
                flags: 0,
                guest_phys_addr: region.gpa,
                memory_size: region.size,
                userspace_addr,
            };
            // SAFETY: the range is a part of `memory`'s guest view, which stays mapped for as long as this value, and so for
            // as long as any vCPU (each holds an Arc of this value). Regions of a layout do not overlap. The VMM reaches that
            // memory through copies and atomics only, so that the guest may change it at any time.
            unsafe { slots.vm.set_user_memory_region(slot) }
                .map_err(|errno| VmError::kvm("KVM_SET_USER_MEMORY_REGION", errno))?;
        }
        Ok(slots)
    }
}

/// The layout, for a failure of which KVM does not say where it was.
impl fmt::Display for Slots {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("slots")?;
        for region in self.memory.layout().regions() {
            let hva = self.memory.hva() + region.offset;
            write!(formatter, " {:#x}+{:#x} at {hva:#x}", region.gpa, region.size)?;
        }
        formatter.write_str(if self.bitmap.is_some() { ", with a userfault bitmap" } else { "" })
    }
}
