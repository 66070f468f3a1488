//! A VMM whose pages another process brings: the delivery `notify`, by KVM Userfault's bitmap.
//!
//! It takes a kernel with KVM_MEM_USERFAULT, and a pager.
//!
//! ```sh
//! cargo run --bin vmm-notify -- snapshot.mem               # writes the snapshot
//! latepage serve late.sock snapshot.mem &
//! cargo run --bin vmm-notify -- snapshot.mem late.sock     # restores from it
//! ```

mod tiny;

use std::error::Error;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region2;
use kvm_ioctls::{Kvm, VcpuExit};
use latepage::attachment::{Backing, native};
use latepage::delivery::channel::{Channel, Completion, Request, Waited};
use latepage::install::PageBitmap;
use latepage::memory::PageTable;
use latepage::sys::mapping::Mapping;
use latepage::sys::uffd::{Features, RegisterMode, Userfaultfd};
use latepage::sys::{fdpass, memfd};
use rustix::event::{PollFd, PollFlags, Timespec};

/// `KVM_MEM_USERFAULT`, of the patches that bring it.
const USERFAULT: u32 = 1 << 3;
/// Looks at the slot before the vCPU's thread sleeps: what is in memory comes in some microseconds.
const SPINS: u32 = 1000;
/// How long it sleeps before it looks whether the pager is there: one that refused the VM, or died, wakes nobody.
const SECOND: Option<Duration> = Some(Duration::from_secs(1));

/// Whether the pager has closed its end of the socket.
fn has_gone(pager: &UnixStream) -> Result<bool, rustix::io::Errno> {
    let mut polled = [PollFd::new(pager, PollFlags::RDHUP)];
    Ok(rustix::event::poll(&mut polled, Some(&Timespec::default()))? > 0)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let snapshot = arguments.next().ok_or("usage: vmm-notify SNAPSHOT [SOCKET]")?;
    let Some(socket) = arguments.next() else { return Ok(tiny::write_snapshot(&snapshot)?) };

    // Guest memory is a memfd, sealed: the pager fills it through a mapping of its own.
    let memory = memfd::create("guest", tiny::BYTES as u64)?;
    let view = Mapping::shared(memory.as_fd(), 0, tiny::BYTES)?;
    let layout = tiny::layout(&view)?;

    // A bit for each page, set while it is absent. The pager clears it.
    let bits = PageBitmap::create(&layout)?;
    let bitmap = PageBitmap::map(&bits, &layout)?;
    bitmap.set(0..layout.pages());
    let vm = Kvm::new()?.create_vm()?;
    let mut slot = kvm_userspace_memory_region2 {
        flags: USERFAULT,
        memory_size: tiny::BYTES as u64,
        userspace_addr: view.address(),
        ..Default::default()
    };
    slot.pad2[0] = bitmap.address(0);
    // SAFETY: `view` and `bitmap` are that long, and stay mapped until the VM is gone.
    #[allow(unsafe_code)]
    unsafe { vm.set_user_memory_region2(slot) }
        .map_err(|error| format!("this kernel has no KVM Userfault ({error})"))?;

    // KVM's own accesses look at no bit: they wait in a userfaultfd, which the pager reads, too. Ours stays open for as long as
    // the VM lives: were the pager's the last one, its death would let them through to zero.
    let userfaultfd = Userfaultfd::create(Features::MINOR_SHMEM)?;
    userfaultfd.register(view.address(), tiny::BYTES as u64, RegisterMode::MISSING | RegisterMode::MINOR)?;

    // A slot of the channel for each vCPU; a table of what is there, for the next pager should this one die; the handshake. The
    // socket stays open, too.
    let channel = Channel::new(1, layout.pages())?;
    let table = PageTable::create(&layout)?;
    let pager = UnixStream::connect(&socket)?;
    let message = native::message_with_channel(
        &native::Introduction {
            name: Some("tiny"),
            vcpus: 1,
            backing: Backing::Shared,
            memory: true,
            layout: &layout,
        },
        native::BesideChannel { bitmap: true, pages: true, userfaultfd: true },
    );
    let (slots, bell) = channel.descriptors();
    let sent = [slots, bell, memory.as_fd(), bits.as_fd(), table.as_fd(), userfaultfd.as_fd()];
    fdpass::send(&pager, message.as_bytes(), &sent)?;

    // The vCPU's thread.
    let mut vcpu = tiny::vcpu(&vm)?;
    let mut seat = channel.seat(0).ok_or("somebody sits at slot 0")?;
    let (mut said, mut exits, mut came) = (None, 0, 0);
    loop {
        match vcpu.run()? {
            VcpuExit::MemoryFault { gpa, .. } => {
                exits += 1;
                let page = layout.find_gpa(gpa).ok_or("an exit where no memory is")?;
                seat.post(&Request::Fault { page, write: false, thread: 0 })?;
                came += loop {
                    match seat.wait(SPINS, SECOND) {
                        Waited::Over(Completion::Done(pages)) => break pages.len(), // their bits are clear
                        Waited::Interrupted => {} // by a signal: a VMM would look what it is asked for
                        Waited::TimedOut if !has_gone(&pager)? => {}
                        Waited::TimedOut => {
                            return Err(format!("the pager went before page {page} came").into());
                        }
                        other => return Err(format!("page {page} could not be had: {other:?}").into()),
                    }
                }
            }
            VcpuExit::IoOut(_, bytes) => said = Some(u16::from_le_bytes([bytes[0], bytes[1]])),
            VcpuExit::Hlt => break,
            other => return Err(format!("the guest came out unexpectedly: {other:?}").into()),
        }
    }
    println!("{came} pages came in {exits} exits");
    if said != Some(tiny::expected()) {
        return Err(format!("the guest says {said:?}, and its snapshot {}", tiny::expected()).into());
    }
    Ok(())
}
