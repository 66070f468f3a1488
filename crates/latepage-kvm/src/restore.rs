//! Restoring: the memory of a saved VM from a file or a pager, and the job in whose middle it was.

use std::os::fd::AsFd;

use latepage::attachment::Form;

use crate::config::{Handshake, MemoryFrom, RestoreConfig};
use crate::control::ActiveJob;
use crate::error::VmError;
use crate::expectation::Expectations;
use crate::handshake::{Attach, PagerLink};
use crate::layout::GuestLayout;
use crate::machine::GuestKind;
use crate::memory::{Backing, GuestMemory};
use crate::shards::Room;
use crate::snapshot::{self, SavedJob};
use crate::vm::after;

/// The job of a state file, to go on with.
pub(crate) fn resume_job(
    saved: SavedJob,
    layout: &GuestLayout,
    now: &Expectations,
) -> Result<ActiveJob, String> {
    saved.job.check(layout)?;
    let after = after(&saved.job, layout, now)?;
    let pages = saved.job.size(layout);
    let mut active = ActiveJob::begin(saved.job, pages, 0, after);
    active.report.wrong_pages = saved.wrong_pages;
    active.report.wrong = saved.wrong;
    active.report.superseded = saved.superseded;
    active.discarded = saved.discarded;
    Ok(active)
}

/// Memory as the configuration asks for it; absent still, if a pager brings it.
pub(crate) fn restore_memory(
    config: &RestoreConfig,
    layout: GuestLayout,
    saved: Backing,
) -> Result<GuestMemory, VmError> {
    let bytes = layout.bytes();
    match &config.memory {
        MemoryFrom::Read { memory_file } => {
            let file = snapshot::open_memory(memory_file, bytes)?;
            let memory = GuestMemory::new(layout, config.backing.unwrap_or(saved), true)?;
            snapshot::load_memory(&memory, &file, memory_file)?;
            Ok(memory)
        }
        MemoryFrom::Map { memory_file } => {
            if let Some(other) = config.backing.filter(|backing| *backing != Backing::Private) {
                return Err(VmError::Config(format!(
                    "a mapped memory file is private memory; it cannot be {other}"
                )));
            }
            let file = snapshot::open_memory(memory_file, bytes)?;
            GuestMemory::from_file(layout, file.as_fd())
        }
        MemoryFrom::Late(_) | MemoryFrom::Notify(_) => {
            GuestMemory::new(layout, config.backing.unwrap_or(Backing::Shared), false)
        }
        MemoryFrom::Pager { .. } => GuestMemory::new(layout, config.backing.unwrap_or(saved), false),
    }
}

/// Attaches the memory to its pager, if it has one.
pub(crate) fn attach(
    config: &RestoreConfig,
    memory: &GuestMemory,
    name: &str,
    vcpus: u32,
    kind: GuestKind,
) -> Result<Option<PagerLink>, VmError> {
    let MemoryFrom::Pager { socket, handshake, send_memory, shards } = &config.memory else {
        return Ok(None);
    };
    let form = match handshake {
        Handshake::Firecracker => Form::Firecracker,
        Handshake::Latepage => Form::Latepage,
    };
    let send_memory = match (send_memory, form) {
        (Some(true), Form::Firecracker) => {
            return Err(VmError::Config(
                "Firecracker's handshake carries no memory file; use --handshake latepage".into(),
            ));
        }
        (Some(true), Form::Latepage) if memory.memfd().is_none() => {
            return Err(VmError::Config(format!("{} memory has no memory file to send", memory.backing())));
        }
        (Some(chosen), _) => *chosen,
        (None, Form::Firecracker) => false,
        (None, Form::Latepage) => memory.backing() == Backing::Shared,
    };
    // KVM's vCPUs have a descriptor each.
    let room = Room::now(if kind == GuestKind::Kvm { vcpus.into() } else { 0 });
    let attach = Attach { socket, form, send_memory, shards: *shards, name, vcpus, room };
    PagerLink::attach(memory, &attach).map(Some)
}
