//! The end of a session, and the watch over it: letting go of a VM that is full, signs of death, faults that wait too long.

use std::sync::Arc;
use std::time::Instant;

use super::report::{End, LetGo, Report};
use super::{Core, Scratch, Session};
use crate::memory::PageState;
use crate::sys::pidfd::PidFd;

impl Session {
    /// Lets go of a VM that has all its memory: its faults are the kernel's own from now on.
    ///
    /// Without this, the VM's next discard would hang for want of a reader of its event.
    pub fn detach(self: &Arc<Self>, scratch: &mut Scratch) -> LetGo {
        if !self.may_detach() || self.owed() > 0 {
            return LetGo::Kept;
        }
        self.inside(scratch, |core, scratch| {
            // Unregistered, a page that failed would read as zero to the one who waits for it.
            if core.waiting.has_stuck() {
                return LetGo::Kept;
            }
            if core.waiting.parked().any(|page| self.pages.state(page) == PageState::Failed) {
                return LetGo::NotYet;
            }
            if core.install.detach(&self.layout).is_err() && core.install.has_memory() {
                return LetGo::Kept;
            }
            // A discard that had begun waits for its event to be read, and may not even have raised it yet.
            while core.deliveries.take(&self.layout, &mut scratch.batch).is_ok() && scratch.batch.more {}
            if core.install.is_changing() {
                return LetGo::NotYet;
            }
            // UNREGISTER does not wake everyone who faults at that moment (seen on 6.18), and what was just read is told nobody.
            for region in 0..self.layout.regions().len() {
                core.deliveries.release(&self.layout, self.layout.region_pages(region));
            }
            self.finish(End::Detached);
            LetGo::Done
        })
        .unwrap_or(LetGo::Kept)
    }

    /// Whether the VM's memory is gone, and with it the session. Asked at every sign of its death.
    pub fn check_alive(self: &Arc<Self>) -> bool {
        let seen = || self.with_process(PidFd::has_ended) == Some(false);
        let lives =
            |core: &mut Core| if core.install.knows_memory() { core.install.has_memory() } else { seen() };
        let alive = self.briefly(lives).unwrap_or(false);
        if !alive {
            self.finish(End::Gone);
        }
        alive
    }

    /// Reports every fault that has waited longer than the policy's limit.
    pub fn check_stalls(&self) {
        self.briefly(|core| {
            let hva = |page| self.layout.place(page).hva;
            core.waiting.stalled(Instant::now(), self.policy.stall_warning, hva, |hva, age| {
                self.stats.counters.stalls.add(1);
                self.host.report(self, Report::Stalled { hva, age });
            });
        });
    }
}
