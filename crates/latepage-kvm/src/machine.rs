//! What runs the guest: KVM, or threads where there is none. Whatever shows a result says which of the two it was.

use std::fmt;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::error::VmError;
use crate::supply::Supply;
use crate::sys::slots::Slots;
use crate::sys::{kick, sigbus};
use crate::trap::{SW_PROTECTED_VM, TrapKind};
use crate::vcpu::{self, KvmVcpu};

/// What runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestKind {
    /// KVM if this process may use /dev/kvm, else threads.
    #[default]
    Auto,
    /// KVM.
    Kvm,
    /// Threads of the VMM, doing what the guest's programs do.
    Threads,
}

impl GuestKind {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Threads => "threads",
        }
    }

    /// [`Kvm`](Self::Kvm) or [`Threads`](Self::Threads), whichever it comes to on this machine.
    ///
    /// # Errors
    /// [`VmError::NoKvm`] where KVM was asked for and is not there.
    pub fn resolve(self) -> Result<Self, VmError> {
        match self {
            Self::Threads => Ok(self),
            Self::Kvm => kvm().map(|_| self),
            Self::Auto => Ok(if kvm().is_ok() { Self::Kvm } else { Self::Threads }),
        }
    }
}

impl fmt::Display for GuestKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

fn kvm() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(|error| VmError::NoKvm(Errno::from_raw_os_error(error.errno())))?;
    if !kvm.check_extension(Cap::ImmediateExit) {
        return Err(VmError::NoKvm(Errno::NOTSUP));
    }
    Ok(kvm)
}

/// The vCPUs of a VM, a thread each.
#[derive(Debug)]
pub(crate) struct Machine {
    kind: GuestKind,
    threads: Vec<JoinHandle<()>>,
}

impl Machine {
    /// Makes the vCPUs that `control` has slots for, and starts their threads.
    pub(crate) fn start(
        kind: GuestKind,
        control: &Arc<Control>,
        supply: Option<&dyn Supply>,
    ) -> Result<Self, VmError> {
        let systems: Vec<_> = control.lock().slots.iter().map(|slot| slot.system).collect();
        let mut vcpus = Vec::new();
        if kind == GuestKind::Kvm {
            kick::install_handler().map_err(|source| VmError::signal(&source))?;
            let kvm = kvm()?;
            let offered = kvm
                .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                .map_err(|errno| VmError::kvm("KVM_GET_SUPPORTED_CPUID", errno))?;
            let by_attributes = supply.and_then(Supply::trap) == Some(TrapKind::Attributes);
            let vm = kvm
                .create_vm_with_type(if by_attributes { SW_PROTECTED_VM } else { 0 })
                .map_err(|errno| VmError::kvm("KVM_CREATE_VM", errno))?;
            let bitmap = supply.and_then(Supply::bitmap).cloned();
            let slots = Arc::new(Slots::new(vm, Arc::clone(&control.memory), bitmap)?);
            if let Some(supply) = supply {
                supply.arm(&slots)?;
            }
            for (index, system) in systems.iter().enumerate() {
                vcpus.push(KvmVcpu::new(
                    &slots,
                    index,
                    &offered,
                    system,
                    supply.and_then(|supply| supply.seat(index)),
                )?);
            }
        }
        if let Some(visitors) = supply.and_then(Supply::visitors) {
            sigbus::install_handler().map_err(|source| VmError::signal(&source))?;
            control.memory.seat_visitors(visitors);
        }
        let mut machine = Self { kind, threads: Vec::new() };
        let mut vcpus = vcpus.into_iter();
        for index in 0..systems.len() {
            let (thread_control, vcpu) = (Arc::clone(control), vcpus.next());
            let seat = match vcpu {
                Some(_) => None,
                None => supply.and_then(|supply| supply.seat(index)),
            };
            let spawned = thread::Builder::new().name(format!("vcpu-{index}")).spawn(move || match vcpu {
                Some(vcpu) => vcpu::kvm_thread(&thread_control, index, vcpu),
                None => vcpu::standin_thread(&thread_control, index, seat),
            });
            match spawned {
                Ok(thread) => machine.threads.push(thread),
                Err(source) => {
                    control.quit(std::time::Duration::from_secs(1));
                    machine.join();
                    return Err(VmError::thread(&source));
                }
            }
        }
        Ok(machine)
    }

    pub(crate) fn kind(&self) -> GuestKind {
        self.kind
    }

    /// Waits for the threads, which end when `control` has quit.
    pub(crate) fn join(self) {
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}
