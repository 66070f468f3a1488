//! A session inside the VMM: threads bring pages themselves, when an access of theirs comes back to them, as a memory-fault exit of
//! their vCPU or as a signal.
//!
//! ```text
//! a vCPU's thread                                         a thread of the VMM: accesses by KVM itself and by the VMM
//! KVM_RUN: EFAULT, KVM_EXIT_MEMORY_FAULT, gpa             userfaultfd over the guest view: a fault, hva
//!   Seat::exit(gpa)                                         Seat::serve
//! or SIGBUS, hva
//!   Seat::touch(hva)
//!      0 enter     a store to the desk's own word
//!      1 claim     absent -> in flight, one atomic step; another one's claim: wait for it
//!      2 fill      COPY: the guest view has the page, who waits at the userfaultfd goes on
//!                  where the memory file had a page already: written through the install view, filled is stored, CONTINUE
//!      3 disarm    the page's bit, or attribute: vCPUs reach it
//!      4 settle    in flight -> present; who waits for the page inside the VMM goes on
//!      5 leave     an exchange of the desk's own word: a discard that waits for that goes on
//! KVM_RUN
//! ```
//!
//! There is no lock on that path, no gate, no allocation, and no cache line that is written for pages of others. A session of the pager
//! needs a gate because others discard memory under it, and here it is the VMM that does ([`Resolver::discard`]).
//! `docs/userfault.md` has the whole.

mod bring;
mod desk;
mod error;
mod seat;
mod serve;
mod stay;
#[cfg(test)]
mod tests;
mod turns;
mod word;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use crate::install::{CopyInstall, Install, MinorInstall, Trap};
use crate::memory::{Layout, PageSize, Pages};
use crate::source::Source;
use crate::sys::uffd::{Features, RegisterMode, Userfaultfd};
use desk::Desk;
use turns::Turns;

pub use desk::ResolverStats;
pub use error::{Address, Reason, ResolverError, Unresolved};
pub use seat::Seat;
pub use serve::Told;

/// The longest run that comes with one fault.
const LONGEST: u64 = 64 << 10;
/// Words that those sleep on who wait for another thread's page.
const WORDS: usize = 256;

/// Brings the pages of one VM, inside that VM's process, on whichever thread wants one. Every such thread takes a [`Seat`].
///
/// Made by [`new`](Self::new), accesses that no trap catches wait at a userfaultfd until a thread serves it; made by
/// [`by_signal`](Self::by_signal), they are a SIGBUS to the thread that makes them. Dropping the value closes its userfaultfd, which
/// would let through to zero pages whoever still waits there, or touches memory afterwards: it must live until the last vCPU has
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
    /// Whose messages are to be served, where accesses wait for that.
    messages: Option<Arc<Userfaultfd>>,
    install: Box<dyn Install>,
    /// For a page that the memory file has before it was brought; and it shows pages once more.
    over: Option<Box<dyn Install>>,
    trap: Option<Arc<dyn Trap>>,
    turns: Turns,
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

impl Resolver {
    /// Over memory whose guest view lies at the layout's addresses in this process, all of it absent: from here on every access
    /// through the guest view waits until a [`Seat::serve`] runs. The guest view must be a shared mapping of `memory`, in pages of
    /// 4 KiB, that has not been touched.
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
        admit(&layout, &*source)?;
        let view = MinorInstall::map(memory, &layout)?;
        // MINOR too: a page that is half written over is in the memory file already, and nobody may see it there.
        let modes = RegisterMode::MISSING | RegisterMode::MINOR;
        let uffd = registered(&layout, Features::MINOR_SHMEM, modes)?;
        let ways = Ways {
            // One call, where a write to the file and CONTINUE are two, and cost half as much again (1.6 and 2.4 us of CPU a page).
            install: Box::new(CopyInstall::new(Arc::clone(&uffd))),
            over: Some(Box::new(MinorInstall::new(Arc::clone(&uffd), view))),
            messages: Some(uffd),
            trap,
        };
        Ok(Self::with(layout, source, ways, seats, window))
    }

    /// The same over memory whose absent pages are a SIGBUS to whoever touches them (`UFFD_FEATURE_SIGBUS`), whose handler calls
    /// [`Seat::touch`]; a system call that is handed such an address says EFAULT, and so does KVM_RUN. Nobody has to serve anything.
    ///
    /// For anonymous memory, and shared memory of a file, in pages of 4 KiB; nobody may have touched it, by whichever view. In a
    /// private mapping of a file a discarded page shows the file's. For as long as the value lives the kernel (khugepaged) maps no huge
    /// pages in a shared one.
    ///
    /// There is no trap here. A seat may disarm one over a page that another thread is discarding; a vCPU that then finds nothing
    /// there would wait at a userfaultfd that is served, and here KVM_RUN would fail without an address.
    ///
    /// # Errors
    /// [`ResolverError`].
    pub fn by_signal(
        layout: Layout,
        source: Arc<dyn Source>,
        seats: usize,
        window: FaultWindow,
    ) -> Result<Arc<Self>, ResolverError> {
        admit(&layout, &*source)?;
        let mut modes = RegisterMode::MISSING;
        if Userfaultfd::offered()?.contains(Features::WP_HUGETLBFS_SHMEM) {
            // Nobody protects anything. But where it may have been done, the kernel does not try first to map the fifteen pages around
            // the one that is read, which it finds mapped: 0.7 us of the 4.8 that a fault in shared memory took.
            modes |= RegisterMode::WP;
        }
        let uffd = registered(&layout, Features::SIGBUS, modes)?;
        let ways = Ways { install: Box::new(CopyInstall::new(uffd)), over: None, messages: None, trap: None };
        Ok(Self::with(layout, source, ways, seats, window))
    }

    fn with(
        layout: Layout,
        source: Arc<dyn Source>,
        ways: Ways,
        seats: usize,
        window: FaultWindow,
    ) -> Arc<Self> {
        let Ways { install, over, messages, trap } = ways;
        Arc::new(Self {
            pages: Pages::new(layout.pages()),
            layout,
            source,
            messages,
            install,
            over,
            trap,
            turns: Turns::new(WORDS),
            desks: (0..seats).map(|_| Desk::new()).collect(),
            window,
        })
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
        Some(Seat::new(Arc::clone(self), number))
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
        ResolverStats::of(&self.desks)
    }

    /// Discards pages of one region: they read as zero from then on, and exit again where there is a trap. `punch` takes them out
    /// of the memory file, and so out of every view (MADV_REMOVE, or fallocate(2) with PUNCH_HOLE), or of anonymous memory
    /// (MADV_DONTNEED). The guest may run meanwhile. Not to be called by a thread that is resolving.
    ///
    /// # Errors
    /// What `punch` says, or the trap, before the hole is punched. The pages count as removed all the same: they are never brought
    /// from the source, and whoever asks for one finds what it held, or zero.
    pub fn discard(&self, pages: Range<u32>, punch: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        for page in pages.clone() {
            self.pages.remove(page);
        }
        // Whoever claimed one of them before may still write what the source has. Nobody does so any more after this.
        self.desks.iter().for_each(|desk| desk.stay.outlast());
        // Armed before the hole is there: punching it takes the pages away from KVM, and the next access exits.
        let armed = self.trap.as_ref().map_or(Ok(()), |trap| trap.arm(&self.layout, pages.clone()));
        let discarded = armed.and_then(|()| punch());
        self.release(pages);
        discarded
    }

    /// Whoever waits for one of these pages, in the kernel or here, looks again.
    fn release(&self, pages: Range<u32>) {
        if pages.is_empty() {
            return;
        }
        if let Some(uffd) = &self.messages {
            let place = self.layout.place(pages.start);
            // It fails for an unaligned or empty range alone.
            let _ = uffd.wake(place.hva, u64::from(pages.end - pages.start) * place.page_size.bytes());
        }
        self.turns.over(pages);
    }

    fn unresolved(&self, page: u32, reason: Reason) -> Unresolved {
        let place = self.layout.place(page);
        Unresolved { at: place.gpa.map_or(Address::Host(place.hva), Address::Guest), reason }
    }
}

/// How pages come, and how those who want one learn of it.
struct Ways {
    install: Box<dyn Install>,
    over: Option<Box<dyn Install>>,
    messages: Option<Arc<Userfaultfd>>,
    trap: Option<Arc<dyn Trap>>,
}

fn admit(layout: &Layout, source: &dyn Source) -> Result<(), ResolverError> {
    if layout.regions().iter().any(|region| region.page_size != PageSize::Small) {
        return Err(ResolverError::HugePages);
    }
    Ok(source.admit(layout)?)
}

/// A userfaultfd over the guest view.
fn registered(
    layout: &Layout,
    features: Features,
    modes: RegisterMode,
) -> Result<Arc<Userfaultfd>, ResolverError> {
    let uffd = Userfaultfd::create(features)?;
    for region in layout.regions() {
        uffd.register(region.hva, region.size, modes)?;
    }
    Ok(Arc::new(uffd))
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver").field("layout", &self.layout).finish_non_exhaustive()
    }
}
