//! A session inside the VMM: vCPUs' threads bring pages themselves, when an access comes back to them as a memory-fault exit.
//!
//! ```text
//! a vCPU's thread                                         a thread of the VMM: accesses by KVM itself and by the VMM
//! KVM_RUN: EFAULT, KVM_EXIT_MEMORY_FAULT, gpa             userfaultfd over the guest view: a fault, hva
//!   Seat::exit(gpa)                                         Seat::serve
//!      1 claim     absent -> in flight, one atomic step; another one's claim: wait for it
//!      2 fill      through the install view; filled is stored
//!      3 show      CONTINUE: the guest view has the page, who waits at the userfaultfd goes on
//!      4 disarm    the page's bit, or attribute: vCPUs reach it
//!      5 settle    in flight -> present; who waits for the page inside the VMM goes on
//! KVM_RUN
//! ```
//!
//! There is no lock on that path and no gate: a session of the pager needs one because others discard memory under it, and here it
//! is the VMM that does ([`Resolver::discard`]). `docs/userfault.md` has the whole.

mod bring;
mod seat;
mod serve;
#[cfg(test)]
mod tests;
mod waiters;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::Errno;

use crate::install::{MinorInstall, Trap};
use crate::memory::{Layout, PageSize, Pages};
use crate::source::{Source, SourceError};
use crate::stats::Counter;
use crate::sys::mapping::MapError;
use crate::sys::uffd::{CreateError, Features, RegisterMode, UffdError, Userfaultfd};
use waiters::Waiters;

pub use seat::Seat;
pub use serve::Told;

/// The longest run that comes with one fault.
const LONGEST: u64 = 64 << 10;

/// Brings the pages of one VM, inside that VM's process, on whichever thread wants one. Every such thread takes a [`Seat`].
///
/// The guest's memory must be a shared mapping of a memory file (the guest view), in pages of 4 KiB. Dropping the value closes its
/// userfaultfd, which would let through to zero pages whoever still waits there: it must live until the last vCPU has
/// stopped.
///
/// ```no_run
/// # // A userfaultfd takes rights that a test of the documentation may not have.
/// # use std::os::fd::AsFd;
/// # use std::sync::Arc;
/// # use latepage::install::PageBitmap;
/// # use latepage::memory::{Layout, PageSize, Region};
/// # use latepage::session::{FaultWindow, Resolver};
/// # use latepage::source::FileSource;
/// # use latepage::sys::{mapping::Mapping, memfd};
/// let memory = memfd::create("guest", 64 << 20)?;
/// let guest_view = Mapping::shared(memory.as_fd(), 0, 64 << 20)?; // what KVM's slot is given
/// let layout = Layout::new(vec![Region {
///     gpa: Some(0),
///     hva: guest_view.address(),
///     size: 64 << 20,
///     offset: 0,
///     page_size: PageSize::Small,
/// }])?;
/// let bitmap = Arc::new(PageBitmap::map(PageBitmap::create(&layout)?, &layout)?); // bitmap.address(0) goes to the slot too
/// let source = Arc::new(FileSource::open("vm.mem")?);
/// let resolver = Resolver::new(layout, &memory, source, Some(bitmap), 3, FaultWindow::default())?;
/// resolver.arm()?; // before the first vCPU runs
///
/// // A vCPU's thread, when KVM_RUN came back with KVM_EXIT_MEMORY_FAULT:
/// let mut seat = resolver.seat(0).expect("nobody else sits there");
/// seat.exit(0x20_1000)?; // now KVM_RUN again
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Resolver {
    layout: Layout,
    pages: Pages,
    source: Arc<dyn Source>,
    uffd: Arc<Userfaultfd>,
    install: MinorInstall,
    trap: Option<Arc<dyn Trap>>,
    waiters: Waiters,
    desks: Box<[Desk]>,
    window: FaultWindow,
}

/// How many bytes may come with a page that is wanted: absent ones behind it, up to the next multiple of the window. A multiple of
/// 4 KiB, 64 KiB at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultWindow(u64);

impl FaultWindow {
    /// So many bytes.
    ///
    /// # Errors
    /// What is wrong with the number.
    pub fn bytes(bytes: u64) -> Result<Self, String> {
        if bytes.is_multiple_of(4096) && (4096..=LONGEST).contains(&bytes) {
            return Ok(Self(bytes));
        }
        Err(format!("{bytes} bytes to come with a fault: it is a multiple of 4096, 65536 at most"))
    }
}

/// The page alone.
impl Default for FaultWindow {
    fn default() -> Self {
        Self(4096)
    }
}

/// A resolver could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ResolverError {
    /// Pages are filled through a second view of the memory, where a page that the pool does not have would be a SIGBUS.
    #[error("memory of huge pages cannot be filled through a second view; use pages of 4 KiB")]
    HugePages,
    /// The snapshot is not this VM's, or cannot be served.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// No userfaultfd.
    #[error("userfaultfd: {0}")]
    Userfaultfd(#[from] CreateError),
    /// The guest view could not be registered.
    #[error("the guest view: {0}")]
    Register(#[from] UffdError),
    /// The install view could not be mapped.
    #[error("the install view: {0}")]
    Map(#[from] MapError),
}

/// A page that cannot be had. The vCPU that wants it must not run on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory at guest address {gpa:#x} could not be had: {reason}")]
pub struct Unresolved {
    /// Where, for the guest; for a region without such an address, in the VMM.
    pub gpa: u64,
    /// Why.
    pub reason: String,
}

/// What the threads of one resolver have done together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResolverStats {
    /// Memory-fault exits.
    pub exits: u64,
    /// Faults by userfaultfd: KVM's own accesses, and the VMM's.
    pub faults: u64,
    /// Of both, those for a page that somebody was bringing already.
    pub joined: u64,
    /// Of both, those for a page that was there when they were looked at.
    pub present: u64,
    /// Pages filled from the source.
    pub filled: u64,
    /// Pages that came as zero: holes of the source, and discarded ones.
    pub zero: u64,
    /// Pages that came unasked, beside one that was.
    pub beside: u64,
}

/// What one thread has to itself: a cache line, so that no two share one.
#[derive(Default)]
#[repr(align(128))]
struct Desk {
    taken: AtomicBool,
    /// Odd while its thread may be filling pages.
    turn: AtomicU64,
    exits: Counter,
    faults: Counter,
    joined: Counter,
    present: Counter,
    filled: Counter,
    zero: Counter,
    beside: Counter,
}

impl Resolver {
    /// Over memory whose guest view lies at the layout's addresses in this process, all of it absent: from here on every access
    /// through the guest view waits until a [`Seat::serve`] runs. The guest view must not have been touched.
    ///
    /// `seats` is how many threads may bring pages: each vCPU, and one for the userfaultfd. Without a trap all accesses come by
    /// the userfaultfd.
    ///
    /// # Errors
    /// [`ResolverError`].
    pub fn new(
        layout: Layout,
        memory: &OwnedFd,
        source: Arc<dyn Source>,
        trap: Option<Arc<dyn Trap>>,
        seats: usize,
        window: FaultWindow,
    ) -> Result<Arc<Self>, ResolverError> {
        if layout.regions().iter().any(|region| region.page_size != PageSize::Small) {
            return Err(ResolverError::HugePages);
        }
        source.admit(&layout)?;
        let view = MinorInstall::map(memory, &layout)?;
        let uffd = Arc::new(Userfaultfd::create(Features::MINOR_SHMEM)?);
        for region in layout.regions() {
            // MINOR too: a page that is half filled is in the memory file already, and nobody may see it there.
            uffd.register(region.hva, region.size, RegisterMode::MISSING | RegisterMode::MINOR)?;
        }
        Ok(Arc::new(Self {
            pages: Pages::new(layout.pages()),
            install: MinorInstall::new(Arc::clone(&uffd), view),
            uffd,
            layout,
            source,
            trap,
            waiters: Waiters::new(),
            desks: (0..seats).map(|_| Desk::default()).collect(),
            window,
        }))
    }

    /// Arms the trap over every page that is not there. Before the first vCPU runs.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn arm(&self) -> Result<(), Errno> {
        let Some(trap) = &self.trap else { return Ok(()) };
        (0..self.layout.regions().len())
            .try_for_each(|region| trap.arm(&self.layout, self.layout.region_pages(region)))
    }

    /// The seat of that number; `None` where there is none, or somebody sits there.
    pub fn seat(self: &Arc<Self>, number: usize) -> Option<Seat> {
        let desk = self.desks.get(number)?;
        if desk.taken.swap(true, Ordering::AcqRel) {
            return None;
        }
        Some(Seat::new(Arc::clone(self), number, self.window.0 as usize))
    }

    /// The regions.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The states of its pages.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// What has been done so far.
    pub fn stats(&self) -> ResolverStats {
        let sum = |of: fn(&Desk) -> &Counter| self.desks.iter().map(|desk| of(desk).get()).sum();
        ResolverStats {
            exits: sum(|desk| &desk.exits),
            faults: sum(|desk| &desk.faults),
            joined: sum(|desk| &desk.joined),
            present: sum(|desk| &desk.present),
            filled: sum(|desk| &desk.filled),
            zero: sum(|desk| &desk.zero),
            beside: sum(|desk| &desk.beside),
        }
    }

    /// Discards pages of one region: they read as zero from then on, and exit again where there is a trap. `punch` takes them out
    /// of the memory file, and so out of every view (MADV_REMOVE, or fallocate(2) with PUNCH_HOLE). The guest may run meanwhile.
    ///
    /// # Errors
    /// What `punch` says, or the trap; then the pages hold what they did, or zero.
    pub fn discard(&self, pages: Range<u32>, punch: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        for page in pages.clone() {
            self.pages.remove(page);
        }
        // Whoever claimed one of them before may still write what the source has. Nobody does so any more after this.
        for desk in &self.desks {
            let turn = desk.turn.load(Ordering::Acquire);
            let mut looks = 0;
            while !turn.is_multiple_of(2) && desk.turn.load(Ordering::Acquire) == turn {
                // Some microseconds, or as long as its source takes.
                looks += 1;
                if looks < 100 {
                    std::thread::yield_now();
                } else {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        // Armed before the hole is there: punching it takes the pages away from KVM, and the next access exits.
        if let Some(trap) = &self.trap {
            trap.arm(&self.layout, pages.clone())?;
        }
        let punched = punch();
        self.release(pages);
        punched
    }

    /// Whoever waits for one of these pages, in the kernel or here, looks again.
    fn release(&self, pages: Range<u32>) {
        if pages.is_empty() {
            return;
        }
        let place = self.layout.place(pages.start);
        // It fails for an unaligned or empty range alone.
        let _ = self.uffd.wake(place.hva, u64::from(pages.end - pages.start) * 4096);
        self.waiters.notify(&pages);
    }

    fn unresolved(&self, page: u32, reason: String) -> Unresolved {
        let place = self.layout.place(page);
        Unresolved { gpa: place.gpa.unwrap_or(place.hva), reason }
    }
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver").field("layout", &self.layout).finish_non_exhaustive()
    }
}
