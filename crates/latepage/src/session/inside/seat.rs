//! The seat of one thread: where a fault is resolved.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::bring::Errand;
use super::{Address, Desk, Reason, Resolver, Unresolved};
use crate::memory::{Claim, PageState};
use crate::sys::buffer::Buffer;

/// The seat of one thread at a [`Resolver`], with its buffer. Leaving it frees it.
///
/// [`exit`](Self::exit) and [`touch`](Self::touch) may be called in the handler of a synchronous signal: they take no lock, allocate
/// nothing, and touch no guest memory by its guest view. A source may do otherwise, and has to say so; a
/// [`FileSource`](crate::source::FileSource) allocates where it refuses, and for a page that the page cache does not have. In a handler
/// of the thread that touched the memory that is no danger, since it held no lock of an allocator then.
pub struct Seat {
    pub(super) resolver: Arc<Resolver>,
    desk: usize,
    /// Where the source reads what it cannot show the kernel. Until then it takes no memory.
    scratch: Buffer,
}

impl Seat {
    pub(super) fn new(resolver: Arc<Resolver>, desk: usize) -> Self {
        let scratch = Buffer::new(resolver.window.0 as usize);
        Self { resolver, desk, scratch }
    }

    /// A vCPU's access came back: the page at this guest-physical address is there when this returns, and the vCPU may run on. It
    /// waits for the source, or for whoever brings the page already.
    ///
    /// # Errors
    /// [`Unresolved`]: the vCPU must not run on.
    pub fn exit(&mut self, gpa: u64) -> Result<(), Unresolved> {
        let page = self.resolver.layout.find_gpa(gpa);
        self.until_there(page.ok_or(Unresolved { at: Address::Guest(gpa), reason: Reason::NoRegion }))
    }

    /// An access of this thread came back as a signal: the page at this address in the VMM (`si_addr`) is there when this returns, and
    /// the access may be tried again. As [`exit`](Self::exit) in all else.
    ///
    /// # Errors
    /// [`Unresolved`]: the access must not be tried again.
    pub fn touch(&mut self, hva: u64) -> Result<(), Unresolved> {
        let page = self.resolver.layout.find_hva(hva);
        self.until_there(page.ok_or(Unresolved { at: Address::Host(hva), reason: Reason::NoRegion }))
    }

    fn until_there(&mut self, page: Result<u32, Unresolved>) -> Result<(), Unresolved> {
        self.desk().exits.add(1);
        let page = page?;
        while !self.resolve(page)? {
            let pages = &self.resolver.pages;
            let is_coming =
                || matches!(pages.state(page), PageState::InFlight | PageState::Clearing | PageState::Filled);
            self.resolver.turns.wait(page, is_coming);
            if pages.state(page) == PageState::Present {
                self.desk().joined.add(1);
                break;
            }
            // Whoever was bringing it has not, or it was discarded since.
        }
        Ok(())
    }

    /// Brings a page, unless somebody else does: then false.
    pub(super) fn resolve(&mut self, page: u32) -> Result<bool, Unresolved> {
        let Self { resolver, desk, scratch } = self;
        let desk = &resolver.desks[*desk];
        let _inside = desk.stay.enter();
        let errand = Errand { desk, page };
        loop {
            let came = match resolver.pages.claim(page) {
                Claim::Fill => resolver.supply(errand, scratch)?,
                Claim::Clear => resolver.clear(errand)?,
                // Filled: whoever filled it is exposing it.
                Claim::Wait | Claim::Expose => return Ok(false),
                Claim::Present => {
                    // Somebody was faster; or it is out of the guest view again, or the trap was armed by somebody else. To
                    // expose it once more does no harm.
                    desk.present.add(1);
                    resolver.show(page..page + 1).map_err(|reason| resolver.unresolved(page, reason))?;
                    true
                }
                Claim::Failed => {
                    resolver.poison(page);
                    return Err(resolver.unresolved(page, Reason::Before));
                }
            };
            if came {
                return Ok(true);
            }
            // It was discarded meanwhile: it is to be zero now.
        }
    }

    pub(super) fn desk(&self) -> &Desk {
        &self.resolver.desks[self.desk]
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.desk().taken.store(false, Ordering::Release);
    }
}

impl std::fmt::Debug for Seat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seat").field("number", &self.desk).finish_non_exhaustive()
    }
}
