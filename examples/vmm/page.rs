//! What docs/howto/vmm.md shows, between what makes it compile. A test sees that the page says the same; nothing runs it.

#![allow(dead_code, unused_variables)]

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use latepage::attachment::native;
use latepage::install::Trap;
use latepage::memory::{Layout, PageTable};
use latepage::sys::fdpass;
use latepage::sys::uffd::{Features, RegisterMode, Userfaultfd};

type Fallible = Result<(), Box<dyn Error>>;

const SPINS: u32 = 1000;

#[derive(Debug)]
struct NoMemoryThere;

impl std::fmt::Display for NoMemoryThere {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an exit where no memory is")
    }
}

impl Error for NoMemoryThere {}

fn cannot_be_had(page: u32, why: latepage::delivery::channel::Waited) -> Box<dyn Error> {
    format!("page {page} could not be had: {why:?}").into()
}

fn has_gone(_: &UnixStream) -> std::io::Result<bool> {
    Ok(false)
}

fn what_you_have(address: u64, length: u64) -> Fallible {
    use latepage::sys::uffd::{Features, RegisterMode, Userfaultfd};

    let userfaultfd = Userfaultfd::create(Features::EVENT_REMOVE)?;
    userfaultfd.register(address, length, RegisterMode::MISSING)?;
    Ok(())
}

fn shared_memory(length: u64, socket: &Path) -> Fallible {
    use latepage::attachment::{Backing, native};
    use latepage::memory::{Layout, PageSize, Region};
    use latepage::sys::{fdpass, mapping::Mapping, memfd};

    let memory = memfd::create("guest", length)?; // sealed against shrinking
    let view = Mapping::shared(memory.as_fd(), 0, length as usize)?; // what KVM's slot is given
    let layout = Layout::new(vec![Region {
        gpa: Some(0),
        hva: view.address(),
        size: length,
        offset: 0,
        page_size: PageSize::Small,
    }])?;
    let userfaultfd = Userfaultfd::create(Features::EVENT_REMOVE | Features::MINOR_SHMEM)?;
    userfaultfd.register(view.address(), length, RegisterMode::MISSING | RegisterMode::MINOR)?;

    let pager = UnixStream::connect(socket)?;
    let message = native::message(&native::Introduction {
        name: Some("vm-7"),
        vcpus: 4,
        backing: Backing::Shared,
        memory: true,
        layout: &layout,
    });
    fdpass::send(&pager, message.as_bytes(), &[userfaultfd.as_fd(), memory.as_fd()])?;
    Ok(())
}

fn several_userfaultfds(
    layout: Layout,
    introduction: native::Introduction<'_>,
    features: Features,
    vcpus: u32,
    memory: OwnedFd,
    pager: UnixStream,
) -> Fallible {
    use latepage::attachment::shards;
    use latepage::memory::Shards;

    let divided = Shards::equal(&layout, shards::suited(vcpus, &layout))?;
    let userfaultfds =
        shards::create(&layout, &divided, features, RegisterMode::MISSING | RegisterMode::MINOR)?;
    let message = native::message_with_shards(&introduction, &divided);
    let mut sent: Vec<_> = userfaultfds.iter().map(AsFd::as_fd).collect();
    sent.push(memory.as_fd());
    fdpass::send(&pager, message.as_bytes(), &sent)?;
    Ok(())
}

fn exit(
    layout: Layout,
    memory: OwnedFd,
    trap: Arc<dyn Trap>,
    mut vcpu: VcpuFd,
    vcpus: u32,
    index: usize,
) -> Fallible {
    use latepage::session::{FaultWindow, Resolver};
    use latepage::source::FileSource;

    let source = Arc::new(FileSource::open("vm.mem")?);
    let resolver =
        Resolver::new(layout, &memory, source, Some(trap), vcpus as usize + 1, FaultWindow::bytes(16384)?)?;
    resolver.arm()?; // before the first vCPU runs

    // The vCPU's thread:
    let mut seat = resolver.seat(index).expect("nobody else sits there");
    loop {
        match vcpu.run()? {
            VcpuExit::MemoryFault { gpa, .. } => seat.exit(gpa)?, // the page is there: run on
            _ => return Ok(()),
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn notify(
    layout: Layout,
    introduction: native::Introduction<'_>,
    memory: OwnedFd,
    bits: OwnedFd,
    userfaultfd: Userfaultfd,
    pager: UnixStream,
    mut vcpu: VcpuFd,
    vcpus: u32,
    index: u32,
) -> Fallible {
    use latepage::delivery::channel::{Channel, Completion, Request, Waited};

    let channel = Channel::new(vcpus, layout.pages())?;
    let table = PageTable::create(&layout)?; // what is there, for the next pager
    let beside = native::BesideChannel { bitmap: true, pages: true, userfaultfd: true };
    let message = native::message_with_channel(&introduction, beside);
    let (slots, bell) = channel.descriptors();
    let sent = [slots, bell, memory.as_fd(), bits.as_fd(), table.as_fd(), userfaultfd.as_fd()];
    fdpass::send(&pager, message.as_bytes(), &sent)?;

    // The vCPU's thread:
    let mut seat = channel.seat(index).expect("nobody else sits there");
    loop {
        match vcpu.run()? {
            VcpuExit::MemoryFault { gpa, .. } => {
                let page = layout.find_gpa(gpa).ok_or(NoMemoryThere)?;
                seat.post(&Request::Fault { page, write: false, thread: 0 })?;
                loop {
                    match seat.wait(SPINS, Some(Duration::from_secs(1))) {
                        Waited::Over(Completion::Done(_)) => break, // its bit is clear: run on
                        Waited::Interrupted => { /* a signal: leave, or wait again */ }
                        Waited::TimedOut if !has_gone(&pager)? => {} // slow: wait again
                        other => return Err(cannot_be_had(page, other)),
                    }
                }
            }
            _ => return Ok(()),
        }
    }
}
