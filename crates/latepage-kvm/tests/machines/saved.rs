//! A saved VM of threads, to be restored late.

use std::path::PathBuf;

use latepage::sys::uffd::{Features, Userfaultfd};
use latepage_kvm::{
    Action, Backing, DiscardRange, GuestKind, Job, MemoryFrom, Order, RestoreConfig, Vm, VmConfig, VmError,
};

use super::{Scratch, config, run, scratch};

/// Pages that read as zero: the first of them, and how many.
const HOLES: (u64, u64) = (2000, 64);

/// Shared memory that holds a seed, but for [`HOLES`].
pub(crate) struct Saved {
    folder: Scratch,
}

impl Saved {
    pub(crate) fn new(vcpus: u32) -> Self {
        let folder = scratch();
        let vm =
            Vm::create(&VmConfig { backing: Backing::Shared, ..config(GuestKind::Threads, vcpus) }).unwrap();
        run(&vm, Job::new(Action::Fill, 1, Order::Sequential));
        vm.discard(DiscardRange::Pages { first: HOLES.0, count: HOLES.1 }).unwrap();
        let saved = Self { folder };
        vm.save(&saved.file("vm.state"), &saved.file("vm.mem")).unwrap();
        saved
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn restore(&self, memory: MemoryFrom, backing: Option<Backing>) -> Result<Vm, VmError> {
        Vm::restore(&RestoreConfig {
            name: Some("vm-restored".into()),
            state_file: self.file("vm.state"),
            memory,
            backing,
            guest: GuestKind::Threads,
            paused: false,
        })
    }
}

/// Whether this process may have a userfaultfd that makes faults signals.
pub(crate) fn may_fault(features: Features) -> bool {
    let refused = Userfaultfd::create(Features::SIGBUS | features).err();
    if let Some(error) = &refused {
        eprintln!("skipped: {error}");
    }
    refused.is_none()
}
