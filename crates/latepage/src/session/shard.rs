//! Shards: slices of a VM's memory, each with a userfaultfd of its own, and a gate. Most VMs are one.
//!
//! What must exclude each other are the reading of a discard's event and the installing of the pages that it names. A discard raises an
//! event on each userfaultfd that is over a part of it, of that part, so that those two always meet at the same gate. So shards
//! need nothing of each other, and are served by several threads at the same time. What they share counts, claims and ends by atomic
//! steps: the page table, the statistics, what is owed, the end.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{PoisonError, Weak};

use super::gate::Gate;
use super::{Core, Session};
use crate::sys::uffd::Userfaultfd;

/// A slice of a VM's memory, and who serves it just now.
pub(super) struct Shard {
    pub(super) gate: Gate<Option<Core>>,
    /// Its userfaultfd, for whoever is inside another shard's gate; it goes with what is inside this one's.
    userfaultfd: Weak<Userfaultfd>,
}

impl Shard {
    pub(super) fn new(core: Core, userfaultfd: Weak<Userfaultfd>) -> Self {
        Self { gate: Gate::new(Some(core)), userfaultfd }
    }

    /// Whether the memory behind its userfaultfd still exists. Asks outside the gate, since nothing is changed by it.
    fn has_memory(&self) -> bool {
        self.userfaultfd.upgrade().is_some_and(|userfaultfd| userfaultfd.has_memory())
    }
}

impl Session {
    /// How many shards its memory has: one for each userfaultfd, at least one.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// The shard that a page belongs to.
    pub fn shard_of(&self, page: u32) -> usize {
        self.divided.of(page)
    }

    /// One past the last page that can come in one run with this one: of its region, and of its shard.
    pub(super) fn run_end(&self, page: u32) -> u32 {
        self.layout.region_end(page).min(self.divided.pages(self.divided.of(page)).end)
    }

    /// Whether the memory behind another shard's userfaultfd than this one's still exists. The memory of one process ends all at once:
    /// where this shard's was gone *before* this is asked, the userfaultfds are not over the memory of one process.
    pub(super) fn others_have_memory(&self, shard: usize) -> bool {
        let others = self.shards.iter().enumerate().filter(|(other, _)| *other != shard);
        others.into_iter().any(|(_, other)| other.has_memory())
    }

    /// Calls `look` with each descriptor of a shard that polls readable when faults wait, until it answers no; not at all once the
    /// session is over. Whether it never answered no.
    pub fn with_descriptors(&self, shard: usize, look: impl FnMut(BorrowedFd<'_>) -> bool) -> bool {
        self.briefly(shard, |core| core.deliveries.descriptors().all(look)).unwrap_or(true)
    }

    /// Runs a little work inside a shard's gate, for threads that may wait for it and have no buffers to serve with: a worker that
    /// came meanwhile is asked to come again.
    pub(super) fn briefly<R>(&self, shard: usize, work: impl FnOnce(&mut Core) -> R) -> Option<R> {
        let gate = &self.shards[shard].gate;
        let mut guard = gate.enter();
        let result = guard.as_mut().map(work);
        if gate.leave_marked(guard) {
            self.host.nudge(self, shard);
        }
        result
    }

    /// Takes a shard down: every descriptor that it held is gone when this returns, and with the last shard all others of the
    /// session, its mappings too. `before` sees the deliveries' descriptors while they still are open. Whether this was the last.
    pub fn take_down(&self, shard: usize, before: impl FnMut(BorrowedFd<'_>)) -> bool {
        let Some(core) = self.shards[shard].gate.enter().take() else { return false };
        core.deliveries.descriptors().for_each(before);
        drop(core);
        let last = self.up.fetch_sub(1, Ordering::AcqRel) == 1;
        if last {
            self.process.lock().unwrap_or_else(PoisonError::into_inner).take();
            self.socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
        last
    }
}
