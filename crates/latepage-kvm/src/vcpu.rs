//! The thread of a vCPU: in and out of the guest, burst by burst.

use std::sync::Arc;

use kvm_bindings::{CpuId, Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::io::Errno;

use crate::control::{Control, Left};
use crate::error::VmError;
use crate::guest::registers::Registers;
use crate::guest::standin::{self, Stop};
use crate::guest::{Program, port};
use crate::layout::GuestLayout;
use crate::supply::{Came, Seat};
use crate::sys::kick::Kick;
use crate::sys::sigbus;
use crate::sys::slots::Slots;
use crate::system_registers::{Segment, SystemRegisters, Table};
use crate::trap::{EXIT_PRIVATE, EXIT_USERFAULT};

/// Where a guest asks KVM to keep its clock (`asm/kvm_para.h`).
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4B56_4D01;
/// How often the same address may exit in a row: each discard of its page is an honest reason, and a kernel that does not do as it
/// says must not make a vCPU go round for ever.
const AGAIN: u32 = 10_000;

/// A vCPU of KVM, with what it needs to stay valid.
#[derive(Debug)]
pub(crate) struct KvmVcpu {
    vcpu: VcpuFd,
    slots: Arc<Slots>,
    /// Where its memory-fault exits are resolved, if it has any.
    seat: Option<Box<dyn Seat>>,
    /// The last of them, and how often in a row it came.
    last: (u64, u32),
}

impl KvmVcpu {
    pub(crate) fn new(
        slots: &Arc<Slots>,
        index: usize,
        cpuid: &CpuId,
        system: &SystemRegisters,
        seat: Option<Box<dyn Seat>>,
    ) -> Result<Self, VmError> {
        let vcpu =
            slots.vm.create_vcpu(index as u64).map_err(|errno| VmError::kvm("KVM_CREATE_VCPU", errno))?;
        // Before the registers: KVM takes those of long mode only from a processor that says it has it.
        vcpu.set_cpuid2(cpuid).map_err(|errno| VmError::kvm("KVM_SET_CPUID2", errno))?;
        let mut sregs = vcpu.get_sregs().map_err(|errno| VmError::kvm("KVM_GET_SREGS", errno))?;
        for (to, from) in [
            (&mut sregs.cs, &system.cs),
            (&mut sregs.ds, &system.ds),
            (&mut sregs.es, &system.es),
            (&mut sregs.fs, &system.fs),
            (&mut sregs.gs, &system.gs),
            (&mut sregs.ss, &system.ss),
            (&mut sregs.tr, &system.tr),
            (&mut sregs.ldt, &system.ldt),
        ] {
            *to = from.into();
        }
        (sregs.gdt, sregs.idt) = ((&system.gdt).into(), (&system.idt).into());
        (sregs.cr0, sregs.cr2, sregs.cr3) = (system.cr0, system.cr2, system.cr3);
        (sregs.cr4, sregs.cr8, sregs.efer) = (system.cr4, system.cr8, system.efer);
        // The APIC base stays as KVM made it: only vCPU 0 carries the mark of the bootstrap processor.
        vcpu.set_sregs(&sregs).map_err(|errno| VmError::kvm("KVM_SET_SREGS", errno))?;
        Ok(Self { vcpu, slots: Arc::clone(slots), seat, last: (0, 0) })
    }

    fn system(&self) -> Result<SystemRegisters, VmError> {
        let sregs = self.vcpu.get_sregs().map_err(|errno| VmError::kvm("KVM_GET_SREGS", errno))?;
        Ok(SystemRegisters {
            cs: (&sregs.cs).into(),
            ds: (&sregs.ds).into(),
            es: (&sregs.es).into(),
            fs: (&sregs.fs).into(),
            gs: (&sregs.gs).into(),
            ss: (&sregs.ss).into(),
            tr: (&sregs.tr).into(),
            ldt: (&sregs.ldt).into(),
            gdt: (&sregs.gdt).into(),
            idt: (&sregs.idt).into(),
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            cr8: sregs.cr8,
            efer: sregs.efer,
            apic_base: sregs.apic_base,
        })
    }

    fn registers(&self) -> Result<Registers, VmError> {
        let regs = self.vcpu.get_regs().map_err(|errno| VmError::kvm("KVM_GET_REGS", errno))?;
        Ok((&regs).into())
    }

    /// Runs until the program is over, the vCPU is kicked, or it fails.
    fn burst(&mut self, control: &Control, index: usize, registers: &Registers) -> Result<Left, VmError> {
        self.vcpu.set_regs(&registers.into()).map_err(|errno| VmError::kvm("KVM_SET_REGS", errno))?;
        loop {
            let (written, byte) = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) => (port, data.first().copied().unwrap_or_default()),
                Ok(VcpuExit::MemoryFault { flags, gpa, .. })
                    if self.seat.is_some() && flags & (EXIT_PRIVATE | EXIT_USERFAULT) != 0 =>
                {
                    match self.memory_fault(gpa, control) {
                        Came::There => continue,
                        Came::Left => return Ok(Left::Paused(self.registers()?)),
                        Came::Not(why) => return Ok(Left::Failed(self.with_place(&why))),
                    }
                }
                Ok(VcpuExit::Intr) => return Ok(Left::Paused(self.registers()?)),
                Ok(other) => {
                    let what = describe(&other, control.memory.layout());
                    return Ok(Left::Failed(self.with_place(&what)));
                }
                Err(error) => match Errno::from_raw_os_error(error.errno()) {
                    Errno::INTR => return Ok(Left::Paused(self.registers()?)),
                    Errno::AGAIN => continue,
                    Errno::FAULT | Errno::HWPOISON => {
                        let what = format!(
                            "memory of the guest could not be had (KVM_RUN: EFAULT, and no address); {}",
                            self.slots
                        );
                        return Ok(Left::Failed(self.with_place(&what)));
                    }
                    _ => return Err(VmError::kvm("KVM_RUN", error)),
                },
            };
            match written {
                port::HELLO => {
                    control.hello();
                    self.complete_output()?;
                    return Ok(Left::Greeted);
                }
                port::PROGRESS => control.progress(index, &self.registers()?),
                port::WRONG => control.wrong(self.registers()?.rdi),
                port::SAID => control.said(self.registers()?.rdi, byte),
                port::DONE => {
                    self.complete_output()?;
                    return Ok(Left::Done(self.registers()?));
                }
                other => {
                    return Ok(Left::Failed(self.with_place(&format!("the guest wrote to port {other:#x}"))));
                }
            }
        }
    }

    /// Has KVM keep the vCPU's clock there.
    fn keep_clock(&self, gpa: u64) -> Result<(), VmError> {
        const ON: u64 = 1;
        let entry = kvm_msr_entry { index: MSR_KVM_SYSTEM_TIME_NEW, data: gpa | ON, ..Default::default() };
        let refused = |errno| VmError::Kvm { call: "KVM_SET_MSRS (MSR_KVM_SYSTEM_TIME_NEW)", errno };
        let entries = Msrs::from_entries(&[entry]).map_err(|_| refused(Errno::NOMEM))?;
        match self.vcpu.set_msrs(&entries) {
            Ok(1) => Ok(()),
            Ok(_) => Err(refused(Errno::NOTSUP)),
            Err(error) => Err(refused(Errno::from_raw_os_error(error.errno()))),
        }
    }

    /// The vCPU wants a page that is absent, or was when it looked.
    fn memory_fault(&mut self, gpa: u64, control: &Control) -> Came {
        // Should another KVM_RUN fail without an address, it must not be taken for this exit.
        self.vcpu.get_kvm_run().exit_reason = 0;
        self.last = if self.last.0 == gpa { (gpa, self.last.1 + 1) } else { (gpa, 1) };
        if self.last.1 > AGAIN {
            return Came::Not(format!("guest address {gpa:#x} was resolved {AGAIN} times, and exits still"));
        }
        match &mut self.seat {
            Some(seat) => seat.exit(gpa, &control.pause),
            None => Came::Not("a memory-fault exit, and nobody to resolve it".into()),
        }
    }

    /// An `out` is over only when KVM_RUN was entered again: registers read or set before that may be changed by its end.
    fn complete_output(&mut self) -> Result<(), VmError> {
        self.vcpu.set_kvm_immediate_exit(1);
        match self.vcpu.run() {
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(VmError::kvm("KVM_RUN", error)),
            Ok(_) => Ok(()),
        }
        // `leave` clears immediate_exit, under the lock under which others set it.
    }

    fn with_place(&self, what: &str) -> String {
        match self.registers() {
            Ok(registers) => {
                format!("{what}; at rip {:#x}, the program's page at {:#x}", registers.rip, registers.rdi)
            }
            Err(_) => what.to_owned(),
        }
    }
}

fn describe(exit: &VcpuExit<'_>, layout: &GuestLayout) -> String {
    match exit {
        // Under some KVMs a poisoned page comes out as device memory. Answering with a value would be lying to the guest.
        VcpuExit::MmioRead(gpa, _) | VcpuExit::MmioWrite(gpa, _) => match layout.offset_of_gpa(*gpa) {
            Some(_) => format!("the memory at guest address {gpa:#x} could not be had"),
            None => format!("the guest went to {gpa:#x}, where no memory is"),
        },
        VcpuExit::MemoryFault { gpa, .. } => format!("the memory at guest address {gpa:#x} could not be had"),
        VcpuExit::Shutdown => "the guest met an exception and shut down".into(),
        VcpuExit::InternalError => "KVM could not emulate the guest (KVM_EXIT_INTERNAL_ERROR)".into(),
        other => format!("the guest came out unexpectedly: {other:?}"),
    }
}

/// Runs what `control` gives to vCPU `index` until the VM ends.
pub(crate) fn kvm_thread(control: &Control, index: usize, mut vcpu: KvmVcpu) {
    while let Some(registers) = control.enter(index, Some(Kick::of_this_thread(&mut vcpu.vcpu))) {
        let clock = control.take_clock(index).map_or(Ok(()), |gpa| vcpu.keep_clock(gpa));
        let left = clock
            .and_then(|()| vcpu.burst(control, index, &registers))
            .unwrap_or_else(|error| Left::Failed(error.to_string()));
        control.leave(index, left, vcpu.system().ok());
    }
}

/// The same for a thread that stands in for a vCPU. At `seat` it sees to what it touches, if its accesses come back to it.
pub(crate) fn standin_thread(control: &Control, index: usize, mut seat: Option<Box<dyn Seat>>) {
    while let Some(mut registers) = control.enter(index, None) {
        let mut run = || {
            standin::run(&control.memory, &mut registers, &control.pause, |port, registers| match port {
                port::HELLO => control.hello(),
                port::PROGRESS => control.progress(index, registers),
                port::WRONG => control.wrong(registers.rdi),
                port::SAID => control.said(registers.rdi, registers.rax as u8),
                _ => {}
            })
        };
        let stop = match &mut seat {
            Some(seat) => sigbus::seated(&mut **seat, run),
            None => run(),
        };
        let left = match stop {
            Stop::Paused => Left::Paused(registers),
            Stop::Done if registers.rip == Program::Hello.entry() => Left::Greeted,
            Stop::Done => Left::Done(registers),
            Stop::Unknown => {
                Left::Failed("a job saved on KVM in the middle of a page cannot go on in threads".into())
            }
        };
        control.leave(index, left, None);
    }
}

impl From<&Registers> for kvm_regs {
    fn from(from: &Registers) -> Self {
        let Registers {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        } = *from;
        Self { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
    }
}

impl From<&kvm_regs> for Registers {
    fn from(from: &kvm_regs) -> Self {
        let kvm_regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        } = *from;
        Self { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
    }
}

impl From<&Segment> for kvm_segment {
    fn from(from: &Segment) -> Self {
        let Segment { base, limit, selector, kind, present, dpl, db, s, l, g, avl, unusable } = *from;
        Self { base, limit, selector, type_: kind, present, dpl, db, s, l, g, avl, unusable, padding: 0 }
    }
}

impl From<&kvm_segment> for Segment {
    fn from(from: &kvm_segment) -> Self {
        let kvm_segment {
            base, limit, selector, type_: kind, present, dpl, db, s, l, g, avl, unusable, ..
        } = *from;
        Self { base, limit, selector, kind, present, dpl, db, s, l, g, avl, unusable }
    }
}

impl From<&Table> for kvm_dtable {
    fn from(from: &Table) -> Self {
        Self { base: from.base, limit: from.limit, ..Self::default() }
    }
}

impl From<&kvm_dtable> for Table {
    fn from(from: &kvm_dtable) -> Self {
        Self { base: from.base, limit: from.limit }
    }
}
