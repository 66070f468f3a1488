//! What cannot be had: the VM is killed, or the page poisoned, or it is held and reported. Never a zero page.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use rustix::io::Errno;

use super::place::Demand;
use super::policy::OnMissing;
use super::report::{Action, Report};
use super::{Core, Scratch, Session};
use crate::delivery::DeliveryError;
use crate::install::Stop;
use crate::memory::PageState;
use crate::stats::{FaultResult, PageClass};

impl Session {
    /// A page that someone waits for cannot be had.
    pub(super) fn fail(&self, core: &mut Core, page: u32, since: Instant, reason: &str) {
        self.stats.counters.failures.add(1);
        if matches!(self.pages.fail(page), PageState::Absent | PageState::InFlight) {
            self.paid(1);
        }
        self.act_on_failure(core, page, since, reason);
    }

    pub(super) fn failed_again(&self, core: &mut Core, page: u32, since: Instant) {
        self.act_on_failure(core, page, since, "it could not be had before");
    }

    fn act_on_failure(&self, core: &mut Core, page: u32, since: Instant, reason: &str) {
        let action = match self.policy.on_missing {
            OnMissing::Kill => self.kill(),
            OnMissing::Poison => match self.poison(core, page..page + 1) {
                Some(action) => action,
                // Tried again, and told, when the kernel lets us.
                None => return core.waiting.park(page, since),
            },
        };
        let hva = self.layout.place(page).hva;
        if action.holds() && !core.waiting.stuck(hva, since) {
            // A VM that wakes itself up asks again and again. It has been told.
            return;
        }
        let waited = since.elapsed().as_nanos() as u64;
        self.stats.by_class.record(PageClass::Unknown, FaultResult::Failed, waited);
        self.host.report(self, Report::Failed { hva, page: Some(page), reason: reason.to_owned(), action });
    }

    /// Pages of `run` were copied from the source, and the source cannot say any more that they were what they should be. Some
    /// are in the guest, where poison does not reach: the VM is killed, whatever its policy says.
    pub(super) fn distrust(&self, core: &mut Core, run: Range<u32>, demand: Demand, reason: &str) {
        self.stats.counters.failures.add(1);
        // What comes ahead of every fault comes for a page that there is not.
        let demanded = demand.filter(|(page, _)| run.contains(page));
        let (page, since) =
            demanded.map_or_else(|| (run.start, Instant::now()), |(page, wait)| (page, wait.since));
        let action = self.kill();
        let hva = self.layout.place(page).hva;
        if action.holds() && !core.waiting.stuck(hva, since) {
            return;
        }
        self.host.report(self, Report::Failed { hva, page: Some(page), reason: reason.to_owned(), action });
    }

    /// A fault where none can be, as outside every region: nobody can say what belongs there, nor how large a page to poison is. The
    /// VM is killed.
    pub(super) fn fail_stray(&self, core: &mut Core, hva: u64, since: Instant, reason: &str) {
        self.stats.counters.failures.add(1);
        let action = self.kill();
        if action.holds() && !core.waiting.stuck(hva, since) {
            return;
        }
        self.host.report(self, Report::Failed { hva, page: None, reason: reason.to_owned(), action });
    }

    /// A shard whose faults do not come, or whose pages cannot be installed: whoever waits there waits for ever, and what the VM still
    /// lacks there is treated as its policy says. Told once for a session, which goes on: its userfaultfds must not be closed.
    pub(super) fn unserved(&self, core: &mut Core, reason: &str) {
        if self.end().is_some() {
            return;
        }
        let action = match self.policy.on_missing {
            OnMissing::Kill => self.kill(),
            OnMissing::Poison => self.poison_lacking(core),
        };
        if !self.lost.swap(true, Ordering::Relaxed) {
            self.stats.counters.failures.add(1);
            let hva = self.layout.place(core.pages.start).hva;
            self.host.report(self, Report::Failed { hva, page: None, reason: reason.to_owned(), action });
        }
    }

    /// Faults cannot be taken. Of a VM that has ended, none come.
    pub(super) fn not_delivered(&self, core: &mut Core, error: &DeliveryError) {
        if core.install.has_memory() {
            self.unserved(core, &format!("its faults cannot be taken: {error}"));
        } else {
            self.lost_memory(core);
        }
    }

    /// Nobody can be told when a shard's faults come: its descriptor cannot be polled.
    pub fn not_watched(&self, shard: usize, errno: Errno) {
        let reason = format!("its userfaultfd cannot be polled: {errno}");
        self.briefly(shard, |core| self.unserved(core, &reason));
    }

    /// Kills the VM.
    pub fn kill(&self) -> Action {
        Action::by_killing(self.pid, self.process.lock().unwrap_or_else(PoisonError::into_inner).as_ref())
    }

    /// Poisons pages; where the kernel cannot, the VM is killed. `None` where it will not just now.
    fn poison(&self, core: &mut Core, run: Range<u32>) -> Option<Action> {
        let mut at = run.start;
        while at < run.end {
            let end = self.layout.region_end(at).min(run.end);
            let outcome = core.install.poison(&self.layout, at..end);
            core.deliveries.failed(&self.layout, at..at + outcome.pages);
            at += outcome.pages;
            match outcome.stopped {
                None => {}
                // A page that is there after all is not poisoned, and not missed.
                Some(Stop::AlreadyThere) => {
                    core.deliveries.release(&self.layout, at..at + 1);
                    at += 1;
                }
                // Nothing is left of it, or there is a living part, which poison does not reach by this.
                Some(Stop::Gone) => {
                    let part = self.others_have_memory(self.divided.of(core.pages.start));
                    return Some(if part { self.kill() } else { Action::Killed });
                }
                Some(Stop::Busy) => return None,
                Some(_) => return Some(self.kill()),
            }
        }
        Some(Action::Poisoned)
    }

    /// Nothing more will be supplied to this VM: what it still lacks is treated as its policy says.
    pub fn give_up(self: &Arc<Self>, scratch: &mut Scratch) -> Action {
        match self.policy.on_missing {
            OnMissing::Kill => self.kill(),
            OnMissing::Poison => {
                let poisoned = |action: &Action| *action == Action::Poisoned;
                let mut shards = (0..self.shards()).map(|shard| {
                    let poison = |core: &mut Core, _: &mut Scratch| self.poison_lacking(core);
                    self.inside(shard, scratch, poison).unwrap_or(Action::Killed)
                });
                shards.find(|action| !poisoned(action)).unwrap_or(Action::Poisoned)
            }
        }
    }

    /// Poisons what a shard lacks, as far as that goes.
    fn poison_lacking(&self, core: &mut Core) -> Action {
        for page in core.pages.clone() {
            if self.pages.state(page).is_lacking() {
                if matches!(self.pages.fail(page), PageState::Absent | PageState::InFlight) {
                    self.paid(1);
                }
                // Nobody tries again after this.
                let action = self.poison(core, page..page + 1).unwrap_or_else(|| self.kill());
                if action != Action::Poisoned {
                    return action;
                }
            }
        }
        Action::Poisoned
    }
}
