//! A VMM whose vCPU brings its own pages: the delivery `exit`, by memory attributes.
//!
//! It takes unmodified Linux 6.8 or later, with CONFIG_KVM_SW_PROTECTED_VM=y.
//!
//! ```sh
//! cargo run --bin vmm-exit -- snapshot.mem
//! ```

mod tiny;

use std::error::Error;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use kvm_bindings::{KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_memory_attributes, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use latepage::install::Trap;
use latepage::memory::Layout;
use latepage::session::{FaultWindow, Resolver};
use latepage::source::FileSource;
use latepage::sys::mapping::Mapping;
use latepage::sys::memfd;
use rustix::event::EventfdFlags;
use rustix::io::Errno;

/// `KVM_X86_SW_PROTECTED_VM`: the type of VM whose ordinary memory may have attributes.
const SW_PROTECTED: u64 = 1;

/// A page that is marked private has no private side here: every access of a vCPU to it is an exit.
struct Attributes(Arc<VmFd>);

impl Attributes {
    fn set(&self, layout: &Layout, pages: Range<u32>, attributes: u32) -> Result<(), Errno> {
        let (address, size) = (layout.place(pages.start).gpa.ok_or(Errno::INVAL)?, pages.len() as u64 * 4096);
        let attributes = kvm_memory_attributes { address, size, attributes: attributes.into(), flags: 0 };
        self.0.set_memory_attributes(attributes).map_err(|error| Errno::from_raw_os_error(error.errno()))
    }
}

impl Trap for Attributes {
    fn arm(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno> {
        self.set(layout, pages, KVM_MEMORY_ATTRIBUTE_PRIVATE)
    }

    fn disarm(&self, layout: &Layout, pages: Range<u32>) -> Result<(), Errno> {
        self.set(layout, pages, 0)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let snapshot = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: vmm-exit SNAPSHOT")?);
    tiny::write_snapshot(&snapshot)?;

    // Guest memory is a memfd: the guest sees it through one mapping, and pages are filled beside that.
    let memory = memfd::create("guest", tiny::BYTES as u64)?;
    let view = Mapping::shared(memory.as_fd(), 0, tiny::BYTES)?;
    let vm = Kvm::new()?.create_vm_with_type(SW_PROTECTED);
    let vm =
        Arc::new(vm.map_err(|error| format!("this kernel has no VM whose memory has attributes ({error})"))?);
    let slot = kvm_userspace_memory_region {
        memory_size: tiny::BYTES as u64,
        userspace_addr: view.address(),
        ..Default::default()
    };
    // SAFETY: `view` is that long, and stays mapped until the VM is gone.
    #[allow(unsafe_code)]
    unsafe {
        vm.set_user_memory_region(slot)?
    };

    // From here on nothing is there: a vCPU's access is an exit, everybody else's waits in a userfaultfd.
    let source = Arc::new(FileSource::open(&snapshot)?);
    let trap = Arc::new(Attributes(Arc::clone(&vm)));
    let (seats, window) = (2, FaultWindow::bytes(16384)?);
    let resolver = Resolver::new(tiny::layout(&view)?, &memory, source, Some(trap), seats, window)?;
    resolver.arm()?;

    // KVM's own accesses, and the VMM's through the guest view: a thread brings those.
    let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
    let mut others = resolver.seat(1).ok_or("somebody sits at seat 1")?;
    let server = thread::spawn({
        let stop = stop.try_clone()?;
        move || others.serve(stop.as_fd(), |told| eprintln!("vmm-exit: {told:?}"))
    });

    // The vCPU's thread.
    let mut vcpu = tiny::vcpu(&vm)?;
    let mut seat = resolver.seat(0).ok_or("somebody sits at seat 0")?;
    let mut said = None;
    loop {
        match vcpu.run()? {
            VcpuExit::MemoryFault { gpa, .. } => seat.exit(gpa)?, // this is all
            VcpuExit::IoOut(_, bytes) => said = Some(u16::from_le_bytes([bytes[0], bytes[1]])),
            VcpuExit::Hlt => break,
            other => return Err(format!("the guest came out unexpectedly: {other:?}").into()),
        }
    }
    rustix::io::write(&stop, &1u64.to_ne_bytes())?;
    server.join().expect("it does not panic")?;
    let stats = resolver.stats();
    println!("{} pages came in {} exits", stats.filled + stats.zero, stats.exits);
    if said != Some(tiny::expected()) {
        return Err(format!("the guest says {said:?}, and its snapshot {}", tiny::expected()).into());
    }
    Ok(())
}
