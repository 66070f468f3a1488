//! A VM of one page and one vCPU, to try what this machine's KVM does when the guest touches it.

use std::os::fd::{FromRawFd, OwnedFd};

use kvm_bindings::{kvm_create_guest_memfd, kvm_userspace_memory_region, kvm_userspace_memory_region2};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use latepage::sys::mapping::Mapping;
use rustix::io::Errno;

use crate::error::VmError;
use crate::fingerprint::PAGE;
use crate::sys::slots::KVM_MEM_USERFAULT;

/// Where the guest has its page.
pub(crate) const GPA: u64 = PAGE;

/// A VM whose only page is `memory`; its vCPU stands at the start of it, in real mode.
///
/// Fields drop in their order: KVM's descriptors before the memory that they point to.
#[derive(Debug)]
pub(crate) struct Trial {
    pub(crate) vcpu: VcpuFd,
    pub(crate) vm: VmFd,
    pub(crate) memory: Mapping,
    /// Of KVM Userfault, if it was asked for: bit 0 is the page.
    pub(crate) bitmap: Option<Mapping>,
}

impl Trial {
    /// A VM of that type (0 is the usual one), with an ordinary memory slot or one under KVM Userfault.
    pub(crate) fn new(vm_type: u64, userfault: bool) -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(|error| VmError::NoKvm(Errno::from_raw_os_error(error.errno())))?;
        let vm = kvm.create_vm_with_type(vm_type).map_err(|errno| VmError::kvm("KVM_CREATE_VM", errno))?;
        let memory = Mapping::anonymous(PAGE as usize)?;
        let bitmap = if userfault { Some(Mapping::anonymous(PAGE as usize)?) } else { None };
        match &bitmap {
            None => {
                let slot = kvm_userspace_memory_region {
                    slot: 0,
                    flags: 0,
                    guest_phys_addr: GPA,
                    memory_size: PAGE,
                    userspace_addr: memory.address(),
                };
                // SAFETY: `memory` is that long and outlives the VM (the order of the fields, and of the variables here);
                // it is only reached through copies and atomics.
                unsafe { vm.set_user_memory_region(slot) }
                    .map_err(|errno| VmError::kvm("KVM_SET_USER_MEMORY_REGION", errno))?;
            }
            Some(bitmap) => {
                let mut slot = kvm_userspace_memory_region2 {
                    slot: 0,
                    flags: KVM_MEM_USERFAULT,
                    guest_phys_addr: GPA,
                    memory_size: PAGE,
                    userspace_addr: memory.address(),
                    ..Default::default()
                };
                // The bitmap's address is the first of the reserved words.
                slot.pad2[0] = bitmap.address();
                // SAFETY: as above, for `memory` and for the bitmap.
                unsafe { vm.set_user_memory_region2(slot) }.map_err(|errno| {
                    VmError::kvm("KVM_SET_USER_MEMORY_REGION2 (KVM_MEM_USERFAULT)", errno)
                })?;
            }
        }
        let vcpu = vm.create_vcpu(0).map_err(|errno| VmError::kvm("KVM_CREATE_VCPU", errno))?;
        let mut trial = Self { vcpu, vm, memory, bitmap };
        trial.point_at_page()?;
        Ok(trial)
    }

    fn point_at_page(&mut self) -> Result<(), VmError> {
        let mut system = self.vcpu.get_sregs().map_err(|errno| VmError::kvm("KVM_GET_SREGS", errno))?;
        (system.cs.base, system.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&system).map_err(|errno| VmError::kvm("KVM_SET_SREGS", errno))?;
        let mut registers = self.vcpu.get_regs().map_err(|errno| VmError::kvm("KVM_GET_REGS", errno))?;
        (registers.rip, registers.rflags) = (GPA, 2);
        self.vcpu.set_regs(&registers).map_err(|errno| VmError::kvm("KVM_SET_REGS", errno))
    }

    /// A guest_memfd of the VM, one page long.
    pub(crate) fn guest_memfd(&self, flags: u64) -> Result<OwnedFd, VmError> {
        let wanted = kvm_create_guest_memfd { size: PAGE, flags, ..Default::default() };
        let made = self
            .vm
            .create_guest_memfd(wanted)
            .map_err(|errno| VmError::kvm("KVM_CREATE_GUEST_MEMFD", errno))?;
        // SAFETY: KVM has just made this descriptor for us, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(made) })
    }
}
