//! Memory slots: which of the VMM's memory the guest sees where.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use crate::error::VmError;
use crate::memory::GuestMemory;

/// A VM descriptor together with the memory that its slots point into.
///
/// Fields drop in their order: the descriptor goes first. vCPUs hold references to the VM in the kernel and to this.
#[derive(Debug)]
pub(crate) struct Slots {
    pub(crate) vm: VmFd,
    _memory: Arc<GuestMemory>,
}

impl Slots {
    /// Gives every region of `memory` to the guest.
    pub(crate) fn new(vm: VmFd, memory: Arc<GuestMemory>) -> Result<Self, VmError> {
        for (slot, region) in memory.layout().regions().iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.gpa,
                memory_size: region.size,
                userspace_addr: memory.hva() + region.offset,
            };
            // SAFETY: the range is a part of `memory`'s guest view, which stays mapped for as long as this value, and so for
            // as long as any vCPU (each holds an Arc of this value). Regions of a layout do not overlap. The VMM reaches that
            // memory through copies and atomics only, so that the guest may change it at any time.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(|errno| VmError::kvm("KVM_SET_USER_MEMORY_REGION", errno))?;
        }
        Ok(Self { vm, _memory: memory })
    }
}
