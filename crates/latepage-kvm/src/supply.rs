//! Memory that is absent at first, and in whose coming the VMM's own threads have a part: they bring it themselves ([`late`](crate::late)),
//! or post what they want to a pager and wait ([`notify`](crate::notify)).

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use latepage::install::PageBitmap;
use latepage::memory::Layout;

use crate::control::Control;
use crate::error::VmError;
use crate::fingerprint::PAGE;
use crate::late::LateReport;
use crate::notify::NotifyReport;
use crate::sys::slots::Slots;
use crate::trap::TrapKind;

/// One VM's absent memory.
pub(crate) trait Supply: Send + Sync + Debug {
    /// Starts what works beside the vCPUs. What makes the VM unable to go on, `control` is told.
    fn start(&self, control: &Arc<Control>) -> Result<(), VmError>;

    /// What makes a vCPU's access an exit, and so what type of VM it takes.
    fn trap(&self) -> Option<TrapKind>;

    /// What KVM looks at for each page.
    fn bitmap(&self) -> Option<&Arc<PageBitmap>>;

    /// Arms the trap of a VM whose slots are there.
    fn arm(&self, slots: &Arc<Slots>) -> Result<(), VmError>;

    /// Where vCPU `index` sees to what it touches, if its accesses come back to it.
    fn seat(&self, index: usize) -> Option<Box<dyn Seat>>;

    /// The same for threads of the VMM that are no vCPUs, one at a time, where these accesses come back too.
    fn visitors(&self) -> Option<Box<dyn Seat>>;

    /// Discards `length` bytes of the memory from `offset` on: they read as zero, and never again as what the snapshot has.
    fn discard(&self, control: &Control, offset: u64, length: u64) -> Result<(), VmError>;

    /// What has come so far, and how.
    fn report(&self) -> SupplyReport;
}

/// What a [`Supply`] has to tell.
#[derive(Debug)]
pub(crate) enum SupplyReport {
    /// The VMM brings the memory itself.
    Late(LateReport),
    /// Its threads post to a pager.
    Notify(NotifyReport),
}

/// What came of an access that came back.
#[derive(Debug)]
pub(crate) enum Came {
    /// The page is there: try again.
    There,
    /// The vCPU was told to leave before it was. It asks again when it runs again.
    Left,
    /// It cannot be had.
    Not(String),
}

/// The seat of one thread: where its accesses to absent pages are seen to.
pub(crate) trait Seat: Send + Debug {
    /// A vCPU's access to this guest-physical address came back. Whoever waits for others may return early once `leave` is set.
    fn exit(&mut self, gpa: u64, leave: &AtomicBool) -> Came;

    /// This thread's access to an address of the VMM came back, as a signal. False where it is none of ours, or cannot be had. It is
    /// called in the signal's handler: it allocates nothing and takes no lock that somebody may hold there. Of what cannot be had it has
    /// said why ([`last_words`](crate::last_words)): the process is about to die of it.
    fn touch(&mut self, address: u64) -> bool;
}

/// The pages of so many bytes from `offset` on, region by region.
pub(crate) fn runs(layout: &Layout, offset: u64, length: u64) -> impl Iterator<Item = Range<u32>> {
    let end = ((offset + length) / PAGE) as u32;
    let mut at = (offset / PAGE) as u32;
    std::iter::from_fn(move || {
        let run = (at < end).then(|| at..end.min(layout.region_end(at)))?;
        at = run.end;
        Some(run)
    })
}
