//! The seat of one thread: where a fault is resolved.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Desk, Resolver, Unresolved};
use crate::memory::{Claim, PageState};

/// The seat of one thread at a [`Resolver`], with its buffer. Leaving it frees it.
pub struct Seat {
    pub(super) resolver: Arc<Resolver>,
    desk: usize,
    scratch: Box<[u8]>,
}

impl Seat {
    pub(super) fn new(resolver: Arc<Resolver>, desk: usize, scratch: usize) -> Self {
        Self { resolver, desk, scratch: vec![0; scratch].into_boxed_slice() }
    }

    /// A vCPU's access came back: the page at this guest-physical address is there when this returns, and the vCPU may run on. It
    /// waits for the source, or for whoever brings the page already.
    ///
    /// # Errors
    /// [`Unresolved`]: the vCPU must not run on.
    pub fn exit(&mut self, gpa: u64) -> Result<(), Unresolved> {
        self.desk().exits.add(1);
        let Some(page) = self.resolver.layout.find_gpa(gpa) else {
            return Err(Unresolved { gpa, reason: "no region has it".into() });
        };
        while !self.resolve(page)? {
            self.desk().joined.add(1);
            let pages = &self.resolver.pages;
            let is_coming =
                || matches!(pages.state(page), PageState::InFlight | PageState::Clearing | PageState::Filled);
            self.resolver.waiters.wait(page, is_coming);
            if pages.state(page) == PageState::Present {
                break;
            }
        }
        Ok(())
    }

    /// Brings a page, unless somebody else does: then false.
    pub(super) fn resolve(&mut self, page: u32) -> Result<bool, Unresolved> {
        self.desk().turn.fetch_add(1, Ordering::AcqRel);
        let resolved = self.resolve_in_turn(page);
        self.desk().turn.fetch_add(1, Ordering::Release);
        resolved
    }

    fn resolve_in_turn(&mut self, page: u32) -> Result<bool, Unresolved> {
        let Self { resolver, desk, scratch } = self;
        let desk = &resolver.desks[*desk];
        loop {
            let came = match resolver.pages.claim(page) {
                Claim::Fill => resolver.supply(desk, scratch, page)?,
                Claim::Clear => resolver.clear(desk, page)?,
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
                    return Err(resolver.unresolved(page, "it could not be had before".into()));
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
