//! The way of a fault: take, claim, supply, release. And who does it when the gate is held.

use std::ops::Range;
use std::sync::Arc;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::batch::{pages_of, side_by_side};
use super::place::Wait;
use super::report::Report;
use super::{Core, Scratch, Session};
use crate::delivery::{Batch, Fault, FaultFlags, Surprise};
use crate::memory::{Claim, PageState};
use crate::stats::{FaultResult, PageClass, Reason};

/// Batches taken from one session before its worker turns to the next.
const BATCHES: usize = 4;

/// The most pages that come in one run because several faults of a batch lie side by side: the first one waits for all of them.
const ALSO: u32 = 15;

/// When a worker that found the gate held looks again.
const SECOND_LOOK: Duration = Duration::from_millis(1);

/// What is left to do after a session has been served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// More faults may be waiting: serve it again after the others.
    pub more: bool,
    /// Parked faults are to be tried again then.
    pub due: Option<Instant>,
    /// Faults that were taken.
    pub faults: u32,
}

impl Served {
    const NOTHING: Self = Self { more: false, due: None, faults: 0 };
}

impl Session {
    /// Serves the faults that wait in a shard. Never waits itself: where another thread holds the gate, that thread serves them.
    pub fn serve(self: &Arc<Self>, shard: usize, scratch: &mut Scratch) -> Served {
        match self.shards[shard].gate.try_enter() {
            Some(guard) => self.serve_and_leave(shard, guard, scratch),
            // Its holder serves what waits. The second look costs nothing that counts, and makes a mark that was missed a
            // matter of a millisecond instead of a hang.
            None => Served { due: Some(Instant::now() + SECOND_LOOK), ..Served::NOTHING },
        }
    }

    fn serve_and_leave<'a>(
        self: &'a Arc<Self>,
        shard: usize,
        mut guard: MutexGuard<'a, Option<Core>>,
        scratch: &mut Scratch,
    ) -> Served {
        let gate = &self.shards[shard].gate;
        loop {
            let served = self.serve_inside(&mut guard, scratch);
            match gate.leave(guard) {
                Some(again) => guard = again,
                None => return served,
            }
            gate.take_wanted();
        }
    }

    /// Runs `work` inside a shard's gate, for threads that may wait for it, and serves what came meanwhile.
    pub(super) fn inside<R>(
        self: &Arc<Self>,
        shard: usize,
        scratch: &mut Scratch,
        work: impl FnOnce(&mut Core, &mut Scratch) -> R,
    ) -> Option<R> {
        let gate = &self.shards[shard].gate;
        let mut guard = gate.enter();
        let result = guard.as_mut().map(|core| work(core, scratch));
        let asked = gate.take_wanted();
        let served = if asked {
            self.serve_and_leave(shard, guard, scratch)
        } else {
            let due = guard.as_ref().and_then(|core| core.waiting.due());
            match gate.leave(guard) {
                Some(again) => {
                    gate.take_wanted();
                    self.serve_and_leave(shard, again, scratch)
                }
                None => Served { due, ..Served::NOTHING },
            }
        };
        // The worker keeps the timers, and the turns.
        if served.more || served.due.is_some() {
            self.host.nudge(self, shard);
        }
        result
    }

    fn serve_inside(self: &Arc<Self>, guard: &mut Option<Core>, scratch: &mut Scratch) -> Served {
        let Some(core) = guard.as_mut() else { return Served::NOTHING };
        if self.end.get().is_some() {
            return Served::NOTHING;
        }
        let (mut more, mut removed, mut served) = (false, 0, 0);
        for _ in 0..BATCHES {
            self.stats.counters.reads.add(1);
            if let Err(error) = core.deliveries.take(&self.layout, &mut scratch.batch) {
                self.not_delivered(core, &error);
                return Served::NOTHING;
            }
            let since = Instant::now();
            for at in 0..scratch.batch.removed.len() {
                self.removed(scratch.batch.removed[at].clone(), since);
            }
            let faults = scratch.batch.faults.len();
            if faults > 0 && served == 0 {
                self.calm.store(0, Ordering::Relaxed);
                self.stats.gaps.record(since.saturating_duration_since(core.served).as_nanos() as u64);
            }
            served += faults as u32;
            core.fresh.begin(faults);
            for at in 0..faults {
                let fault = scratch.batch.faults[at];
                self.count(fault);
                let wait = Wait { since, result: FaultResult::Installed };
                if at > 0 && self.came_already(core, fault, wait) {
                    continue;
                }
                let also = side_by_side(&scratch.batch.faults[at..], ALSO);
                self.fault_with(core, &mut scratch.bytes, fault, also, wait);
            }
            core.fresh.end();
            core.deliveries.served();
            while let Some(surprise) = scratch.batch.surprises.pop() {
                self.surprised(core, surprise, since);
            }
            more = scratch.batch.more;
            removed += pages_of(&scratch.batch.removed);
            // Walking them is work, and others wait for their turn.
            if !more || removed >= u64::from(Batch::REMOVALS) {
                break;
            }
        }
        if core.around.is_pending() {
            more |= self.bring_ahead(core, &mut scratch.bytes);
        }
        self.retry(core, scratch);
        Served { more, due: core.waiting.due(), faults: served }
    }

    /// Whether a fault of a batch is over, since its page came with another one of the same batch.
    fn came_already(&self, core: &mut Core, fault: Fault, wait: Wait) -> bool {
        let protects = fault.flags.contains(FaultFlags::WP);
        let Some(came) = core.fresh.find(fault.page).filter(|_| !protects) else { return false };
        // Taken away again since, it is looked at the long way.
        if self.pages.state(fault.page) != PageState::Present {
            return false;
        }
        self.waited(wait, came.class, came.at);
        self.stats.counters.joined.add(1);
        if core.around.touched(fault.page) {
            self.stats.counters.beside_touched.add(1);
        }
        self.stats.trace.record(fault.page..fault.page + 1, Reason::Demand, self.now_ns(wait.since));
        true
    }

    fn count(&self, fault: Fault) {
        let counters = &self.stats.counters;
        counters.faults.add(1);
        if fault.flags.contains(FaultFlags::WRITE) {
            counters.writes.add(1);
        }
        if fault.flags.contains(FaultFlags::MINOR) {
            counters.minors.add(1);
        }
        if fault.flags.contains(FaultFlags::WP) {
            counters.write_protects.add(1);
        }
    }

    /// One fault, from its claim to its release; or parked, or out with an I/O thread.
    pub(super) fn fault(self: &Arc<Self>, core: &mut Core, bytes: &mut [u8], fault: Fault, wait: Wait) {
        self.fault_with(core, bytes, fault, 0, wait);
    }

    /// The same, where others of its batch wait for the `also` pages behind its own.
    fn fault_with(self: &Arc<Self>, core: &mut Core, bytes: &mut [u8], fault: Fault, also: u32, wait: Wait) {
        let page = fault.page;
        if fault.flags.contains(FaultFlags::WP) {
            // Nothing of ours protects pages yet: whoever did, the write may go on.
            core.install.unprotect(&self.layout, page);
            core.deliveries.release(&self.layout, page..page + 1);
            return;
        }
        match self.pages.claim(page) {
            Claim::Fill => self.supply(core, bytes, fault, also, wait),
            Claim::Clear => self.clear(core, page, wait),
            // Whoever has claimed it releases everyone who waits for the page.
            Claim::Wait => self.stats.counters.joined.add(1),
            claim @ (Claim::Expose | Claim::Present) => {
                if claim == Claim::Present {
                    self.stats.counters.present.add(1);
                    if core.around.touched(page) {
                        self.stats.counters.beside_touched.add(1);
                    }
                }
                // It came before it was asked for: the trace shall say that it was asked for, too.
                self.stats.trace.record(page..page + 1, Reason::Demand, self.now_ns(wait.since));
                self.expose(core, page..page + 1, Some((page, wait)), PageClass::Resident);
            }
            Claim::Failed => self.failed_again(core, page, wait.since),
        }
    }

    /// The VMM has discarded pages: from now on they read as zero, or as what their file then holds.
    pub(super) fn removed(&self, pages: Range<u32>, now: Instant) {
        let at = self.now_ns(now);
        let (mut run, mut owed, mut removed) = (pages.start..pages.start, 0, 0);
        for page in pages {
            let was = self.pages.remove(page);
            owed += u64::from(matches!(was, PageState::Absent | PageState::InFlight));
            if was == PageState::Removed {
                continue;
            }
            removed += 1;
            if run.end != page {
                self.stats.trace.record(run, Reason::Removed, at);
                run = page..page;
            }
            run.end = page + 1;
        }
        self.stats.trace.record(run, Reason::Removed, at);
        self.stats.counters.removed_pages.add(removed);
        self.paid(owed);
    }

    fn surprised(&self, core: &mut Core, surprise: Surprise, since: Instant) {
        let what = surprise.to_string();
        match surprise {
            // It would wait for ever: no region says what belongs there.
            Surprise::Stray(address) => {
                let reason = "the address is outside every region that the VM named";
                return self.fail_stray(core, address, since, reason);
            }
            // Whoever installs there excludes others' reading, not this one's.
            Surprise::Misplaced(address) => {
                let reason = "its userfaultfd was announced for another shard of the memory";
                return self.fail_stray(core, address, since, reason);
            }
            Surprise::Forked(child) => core.forked.push(child),
            Surprise::Moved { .. } | Surprise::Unknown(_) => {}
        }
        self.host.report(self, Report::Surprise(what));
    }

    /// Tries parked faults again, once each, if their time has come.
    fn retry(self: &Arc<Self>, core: &mut Core, scratch: &mut Scratch) {
        if core.waiting.due().is_none() {
            return;
        }
        let round = core.waiting.begin_round(Instant::now());
        for _ in 0..round {
            let Some(waiting) = core.waiting.next_parked() else { break };
            self.stats.counters.retries.add(1);
            let fault = Fault { page: waiting.page, flags: FaultFlags::empty(), thread: 0 };
            let wait = Wait { since: waiting.since, result: FaultResult::Deferred };
            self.fault(core, &mut scratch.bytes, fault, wait);
        }
        if round > 0 {
            core.waiting.end_round();
        }
    }
}
