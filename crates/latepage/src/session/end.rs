//! The end of a session, and the watch over it: letting go of a VM that is full, signs of death, faults that wait too long.

use std::sync::Arc;
use std::time::Instant;

use super::report::{End, LetGo, Report};
use super::{Core, Scratch, Session};
use crate::memory::PageState;
use crate::sys::pidfd::PidFd;

/// What is done with one shard on the way to letting a VM go.
type Step = fn(&Session, &mut Core, &mut Scratch) -> LetGo;

impl Session {
    /// Lets go of a VM that has all its memory: its faults are the kernel's own from now on.
    ///
    /// Without this, the VM's next discard would hang for want of a reader of its event.
    pub fn detach(self: &Arc<Self>, scratch: &mut Scratch) -> LetGo {
        if !self.may_detach() || self.owed() > 0 {
            return LetGo::Kept;
        }
        // No shard is let go before all may go. Should another one still turn out to have to stay, this one has no more faults: no harm.
        let mut steps: &[Step] = &[Self::may_go, Self::let_go];
        if self.shards() == 1 {
            steps = &steps[1..];
        }
        for step in steps {
            for shard in 0..self.shards() {
                let done = self.inside(shard, scratch, |core, scratch| step(self, core, scratch));
                match done.unwrap_or(LetGo::Kept) {
                    LetGo::Done => {}
                    kept => return kept,
                }
            }
        }
        self.finish(End::Detached);
        LetGo::Done
    }

    /// Whether nobody waits for a page of this shard that failed: unregistered, it would read as zero to him.
    fn may_go(&self, core: &mut Core, _: &mut Scratch) -> LetGo {
        if core.waiting.has_stuck() {
            LetGo::Kept
        } else if core.waiting.parked().any(|page| self.pages.state(page) == PageState::Failed) {
            LetGo::NotYet
        } else {
            LetGo::Done
        }
    }

    fn let_go(&self, core: &mut Core, scratch: &mut Scratch) -> LetGo {
        match self.may_go(core, scratch) {
            LetGo::Done => {}
            kept => return kept,
        }
        if core.install.detach(&self.layout, core.pages.clone()).is_err() && core.install.has_memory() {
            return LetGo::Kept;
        }
        // A discard that had begun waits for its event to be read, and may not even have raised it yet.
        while core.deliveries.take(&self.layout, &mut scratch.batch).is_ok() && scratch.batch.more {}
        if core.install.is_changing() {
            return LetGo::NotYet;
        }
        // UNREGISTER does not wake everyone who faults at that moment (seen on 6.18), and what was just read is told nobody.
        let mut at = core.pages.start;
        while at < core.pages.end {
            let end = self.run_end(at);
            core.deliveries.release(&self.layout, at..end);
            at = end;
        }
        LetGo::Done
    }

    /// Whether the VM lives. Asked at every sign of its death: where all of its memory is gone, so is the session.
    pub fn check_alive(self: &Arc<Self>) -> bool {
        let seen = || self.with_process(PidFd::has_ended) == Some(false);
        let lives =
            |core: &mut Core| if core.install.knows_memory() { core.install.has_memory() } else { seen() };
        let gone: Vec<usize> =
            (0..self.shards()).filter(|shard| !self.briefly(*shard, lives).unwrap_or(false)).collect();
        let Some(first) = gone.first() else { return true };
        if !self.others_have_memory(*first) {
            self.finish(End::Gone);
            return false;
        }
        for shard in gone {
            self.briefly(shard, |core| self.lost_memory(core));
        }
        self.end().is_none()
    }

    /// The memory behind a shard's userfaultfd is gone, as when the VM ends. Only if that is so of every shard, has it ended: a session that
    /// is over closes its userfaultfds, and a VM that lived would go on with pages of zeros.
    pub(super) fn lost_memory(&self, core: &mut Core) {
        if self.others_have_memory(self.divided.of(core.pages.start)) {
            self.unserved(
                core,
                "the memory behind its userfaultfd is gone, and behind another one's it is not",
            );
        } else {
            self.finish(End::Gone);
        }
    }

    /// Reports every fault that has waited longer than the policy's limit.
    pub fn check_stalls(&self) {
        for shard in 0..self.shards() {
            self.briefly(shard, |core| {
                let hva = |page| self.layout.place(page).hva;
                core.waiting.stalled(Instant::now(), self.policy.stall_warning, hva, |hva, age| {
                    self.stats.counters.stalls.add(1);
                    self.host.report(self, Report::Stalled { hva, age });
                });
            });
        }
    }
}
