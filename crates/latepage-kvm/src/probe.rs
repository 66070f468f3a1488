//! What this machine's KVM does, found by trying it on a VM of one page: capability numbers tell less, and those of patches
//! that are not in mainline belong to others there.

use std::os::fd::AsFd;
use std::thread;

use kvm_bindings::{KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_memory_attributes};
use kvm_ioctls::{VcpuExit, VcpuFd};
use latepage::sys::mapping::Mapping;
use latepage::sys::uffd::{Features, InstallMode, MessageBuffer, RegisterMode, Userfaultfd};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::error::VmError;
use crate::fingerprint::PAGE;
use crate::sys::trial::{GPA, Trial};
use crate::trap::{EXIT_PRIVATE, EXIT_USERFAULT, SW_PROTECTED_VM};

/// The guest's whole program.
const HLT: u8 = 0xF4;
/// `GUEST_MEMFD_FLAG_MMAP` and `_INIT_SHARED` (Linux 6.18).
const MMAP_SHARED: u64 = 0b11;
/// No fault takes as long; a kernel that never reports it must not make the trial wait for ever.
const PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// Why a trial came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// A call that it needs was refused.
    #[error(transparent)]
    Refused(#[from] VmError),
    /// Everything was accepted, and then something else happened.
    #[error("{0}")]
    Otherwise(String),
}

/// Makes a VM with a page and a vCPU.
///
/// # Errors
/// [`VmError`]: the call that was refused.
pub fn vm() -> Result<(), VmError> {
    Trial::new(0, false).map(drop)
}

/// A vCPU touches an absent page, the fault comes by userfaultfd, and the vCPU goes on with what is copied in.
///
/// # Errors
/// [`TrialError`].
pub fn fault_by_userfaultfd() -> Result<(), TrialError> {
    let Trial { mut vcpu, vm, memory, bitmap: _ } = Trial::new(0, false)?;
    let userfaultfd = Userfaultfd::create(Features::empty()).map_err(VmError::from)?;
    userfaultfd.register(memory.address(), PAGE, RegisterMode::MISSING).map_err(VmError::from)?;
    let left = thread::scope(|scope| {
        let runs = scope.spawn(|| exit(&mut vcpu));
        let came = serve_one(&userfaultfd, &memory);
        // Whatever came or not, the vCPU must not be left waiting.
        let _ = userfaultfd.unregister(memory.address(), PAGE);
        let left = runs.join().unwrap_or_else(|_| "a panic".into());
        came.map(|()| left)
    });
    drop((vcpu, vm));
    match left?.as_str() {
        "Hlt" => Ok(()),
        other => Err(TrialError::Otherwise(format!("the guest went on with something else: {other}"))),
    }
}

fn serve_one(userfaultfd: &Userfaultfd, memory: &Mapping) -> Result<(), TrialError> {
    let mut polled = [PollFd::new(userfaultfd, PollFlags::IN)];
    let ready = rustix::event::poll(&mut polled, Some(&PATIENCE))
        .map_err(|errno| VmError::Call { call: "poll", errno })?;
    let mut messages = MessageBuffer::new(1);
    if ready == 0 || userfaultfd.read(&mut messages) != Ok(1) {
        return Err(TrialError::Otherwise("the vCPU's access raised no fault".into()));
    }
    let installed = userfaultfd.copy(memory.address(), &program(), InstallMode::empty());
    match installed.stopped {
        None => Ok(()),
        Some(errno) => Err(VmError::Call { call: "UFFDIO_COPY", errno }.into()),
    }
}

/// A vCPU's access to a page that is marked private comes back as a memory-fault exit, and goes on once the mark is taken off.
///
/// # Errors
/// [`TrialError`].
pub fn exit_by_attributes() -> Result<(), TrialError> {
    let mut trial = Trial::new(SW_PROTECTED_VM, false)?;
    let mark = |trial: &Trial, attributes: u32| {
        let attributes = kvm_memory_attributes {
            address: GPA,
            size: PAGE,
            attributes: attributes.into(),
            ..Default::default()
        };
        trial
            .vm
            .set_memory_attributes(attributes)
            .map_err(|errno| VmError::kvm("KVM_SET_MEMORY_ATTRIBUTES", errno))
    };
    mark(&trial, KVM_MEMORY_ATTRIBUTE_PRIVATE)?;
    expect_fault(&mut trial, EXIT_PRIVATE)?;
    mark(&trial, 0)?;
    expect_hlt(&mut trial)
}

/// The same with KVM Userfault: a set bit makes the access an exit, a cleared one lets it go on.
///
/// # Errors
/// [`TrialError`].
pub fn exit_by_userfault() -> Result<(), TrialError> {
    let mut trial = Trial::new(0, true)?;
    set_bitmap(&trial, 1);
    expect_fault(&mut trial, EXIT_USERFAULT)?;
    set_bitmap(&trial, 0);
    expect_hlt(&mut trial)
}

fn set_bitmap(trial: &Trial, value: u64) {
    if let Some(bitmap) = &trial.bitmap {
        bitmap.store(0, value);
    }
}

fn expect_fault(trial: &mut Trial, flag: u64) -> Result<(), TrialError> {
    trial.memory.write(0, &program());
    match trial.vcpu.run() {
        Ok(VcpuExit::MemoryFault { flags, gpa, .. }) if flags & flag != 0 && gpa == GPA => Ok(()),
        other => Err(TrialError::Otherwise(format!("the access was no memory-fault exit: {other:?}"))),
    }
}

fn expect_hlt(trial: &mut Trial) -> Result<(), TrialError> {
    match exit(&mut trial.vcpu).as_str() {
        "Hlt" => Ok(()),
        other => {
            Err(TrialError::Otherwise(format!("the page was released and the guest did not go on: {other}")))
        }
    }
}

fn exit(vcpu: &mut VcpuFd) -> String {
    match vcpu.run() {
        Ok(exit) => format!("{exit:?}"),
        Err(error) => error.to_string(),
    }
}

fn program() -> [u8; PAGE as usize] {
    [HLT; PAGE as usize]
}

/// What can be done with a guest_memfd.
#[derive(Debug)]
pub struct GuestMemfd {
    /// Made with the flags MMAP and INIT_SHARED.
    pub made: Result<(), VmError>,
    /// Why user space could not map it.
    pub unmappable: Option<Errno>,
    /// A userfaultfd may be registered over the mapping: the modes that were accepted, or the errno of MISSING.
    pub registered: Option<Result<RegisterMode, Errno>>,
}

/// Tries a guest_memfd that user space can map.
///
/// # Errors
/// [`VmError`]: no VM could be made at all.
pub fn guest_memfd() -> Result<GuestMemfd, VmError> {
    let trial = Trial::new(0, false)?;
    let file = match trial.guest_memfd(MMAP_SHARED) {
        Ok(file) => file,
        Err(error) => return Ok(GuestMemfd { made: Err(error), unmappable: None, registered: None }),
    };
    let mapping = match Mapping::shared(file.as_fd(), 0, PAGE as usize) {
        Ok(mapping) => mapping,
        Err(error) => {
            return Ok(GuestMemfd { made: Ok(()), unmappable: Some(error.errno), registered: None });
        }
    };
    let registered = Userfaultfd::create(Features::empty()).ok().map(|userfaultfd| {
        let mut accepted = RegisterMode::empty();
        let mut refused = Errno::INVAL;
        for mode in [RegisterMode::MISSING, RegisterMode::MINOR] {
            match userfaultfd.register(mapping.address(), PAGE, mode) {
                Ok(_) => accepted |= mode,
                Err(error) => refused = error.errno,
            }
        }
        if accepted.is_empty() { Err(refused) } else { Ok(accepted) }
    });
    Ok(GuestMemfd { made: Ok(()), unmappable: None, registered })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skipped() -> bool {
        let refused = vm().err();
        if let Some(error) = &refused {
            eprintln!("skipped: {error}");
        }
        refused.is_some()
    }

    #[test]
    fn a_vcpus_access_comes_by_userfaultfd_and_goes_on() {
        if skipped() {
            return;
        }
        match fault_by_userfaultfd() {
            Err(TrialError::Refused(error @ VmError::Userfaultfd(_))) => eprintln!("skipped: {error}"),
            other => other.unwrap(),
        }
    }

    #[test]
    fn a_trial_of_exits_either_works_or_names_the_call_that_was_refused() {
        if skipped() {
            return;
        }
        for tried in [exit_by_attributes(), exit_by_userfault()] {
            match tried {
                Ok(()) => {}
                Err(TrialError::Refused(VmError::Kvm { call, .. })) => assert!(call.starts_with("KVM_")),
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_guest_memfd_that_was_not_made_is_neither_mapped_nor_registered() {
        if skipped() {
            return;
        }
        let tried = guest_memfd().unwrap();
        if tried.made.is_err() || tried.unmappable.is_some() {
            assert!(tried.registered.is_none());
        }
    }
}
