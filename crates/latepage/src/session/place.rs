//! Pages on their way into the guest: contents, zero, exposure; and what is counted when they are there.
//!
//! Every answer of the kernel is met here: docs/install.md has the table.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::answer::vouched;
use super::report::Report;
use super::steps::Steps;
use super::{Core, Session};
use crate::attachment::Backing;
use crate::install::{Install, Outcome, Stop, ZEROS};
use crate::memory::{Layout, PageState};
use crate::source::{Answer, all_zero};
use crate::stats::{FaultResult, PageClass, Reason};
use crate::sys::mapping::Window;

/// Someone's wait for a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    /// Since when.
    pub(super) since: Instant,
    /// What came of the fault, should its page be installed now.
    pub(super) result: FaultResult,
}

/// The page that someone waits for, and his wait. `None` where pages are brought unasked.
pub(super) type Demand = Option<(u32, Wait)>;

/// What pages are filled with.
#[derive(Clone, Copy)]
pub(super) enum Contents<'a> {
    /// Bytes that were read.
    Bytes(&'a [u8]),
    /// What only the kernel reads.
    Window(Window<'a>),
}

impl Contents<'_> {
    /// Fills pages from `first` on with the bytes of `part`.
    pub(super) fn fill(
        self,
        install: &dyn Install,
        layout: &Layout,
        first: u32,
        part: Range<usize>,
    ) -> Outcome {
        match self {
            Self::Bytes(bytes) => install.fill(layout, first, &bytes[part]),
            Self::Window(window) => install.fill_window(layout, first, window.part(part)),
        }
    }
}

impl Session {
    /// Installs a run of claimed pages with what the source answered: zero pages as zero, the rest as they are.
    /// Returns what stopped it, if something did; what had not come by then is nobody's again.
    pub(super) fn put(
        &self,
        core: &mut Core,
        run: Range<u32>,
        answer: Answer<'_>,
        demand: Demand,
    ) -> Option<Stop> {
        let Answer::Bytes(bytes) = answer else {
            return self.put_zero(core, run, demand);
        };
        let unit = self.unit(run.start);
        let is_zero = |page: u32| all_zero(&bytes[(page - run.start) as usize * unit..][..unit]);
        let (mut at, mut zero) = (run.start, is_zero(run.start));
        while at < run.end {
            let mut next = false;
            let same = |page: &u32| {
                next = is_zero(*page);
                next != zero
            };
            let end = (at + 1..run.end).find(same).unwrap_or(run.end);
            let stopped = if zero {
                self.put_zero(core, at..end, demand)
            } else {
                let contents = &bytes[(at - run.start) as usize * unit..(end - run.start) as usize * unit];
                self.put_contents(core, at..end, Contents::Bytes(contents), demand)
            };
            if stopped.is_some() {
                self.abandon(end..run.end);
                return stopped;
            }
            (at, zero) = (end, next);
        }
        None
    }

    /// Installs a run of claimed pages straight from a source's window, and has the source vouch for what was copied.
    /// Returns what stopped it, if something did; what had not come by then is nobody's again.
    ///
    /// After [`Stop::Hole`] the window shows nothing (any more) at the first page that has not come: nothing is parked then, and
    /// the caller has the source read it.
    pub(super) fn put_window(
        &self,
        core: &mut Core,
        run: Range<u32>,
        contents: Window<'_>,
        demand: Demand,
    ) -> Option<Stop> {
        let stopped = self.put_contents(core, run.clone(), Contents::Window(contents), demand);
        if let Err(error) = vouched(&*self.source) {
            self.distrust(core, run, demand, &error.to_string());
        }
        stopped
    }

    fn put_contents(
        &self,
        core: &mut Core,
        run: Range<u32>,
        contents: Contents<'_>,
        demand: Demand,
    ) -> Option<Stop> {
        let unit = self.unit(run.start);
        let mut steps = Steps::new(run.clone());
        let exposes = core.install.fill_exposes();
        while let Some(step) = steps.next() {
            let from = (step.start - run.start) as usize * unit;
            let to = (step.end - run.start) as usize * unit;
            let outcome = contents.fill(&*core.install, &self.layout, step.start, from..to);
            let done = step.start..step.start + outcome.pages;
            if exposes {
                core.waiting.starved &= outcome.pages == 0;
                self.settle(core, done, false, demand);
            } else if !done.is_empty() {
                let stopped = self.expose_filled(core, done.clone(), false, demand);
                if stopped.is_some() {
                    self.abandon(done.end..run.end);
                    return stopped;
                }
            }
            if outcome.stopped == Some(Stop::Hole) && matches!(contents, Contents::Window(_)) {
                steps.after(outcome);
                self.abandon(steps.left());
                return Some(Stop::Hole);
            }
            let stopped = self.go_on(core, &mut steps, outcome, demand);
            if stopped.is_some() {
                return stopped;
            }
        }
        None
    }

    /// Pages that we have claimed have their contents: says so first, and exposes them then. Should this pager die in between, the next
    /// one must not fill again what the guest may have written to.
    fn expose_filled(&self, core: &mut Core, run: Range<u32>, zero: bool, demand: Demand) -> Option<Stop> {
        for page in run.clone() {
            self.pages.filled(page);
        }
        self.paid(u64::from(run.end - run.start));
        self.account(run.clone(), zero, demand, Instant::now());
        let class = if zero { PageClass::Zero } else { PageClass::Source };
        self.expose(core, run, demand, class)
    }

    fn put_zero(&self, core: &mut Core, run: Range<u32>, demand: Demand) -> Option<Stop> {
        if self.pages.is_handed() {
            return self.put_blank(core, run, demand);
        }
        let unit = self.unit(run.start);
        let mut steps = Steps::new(run);
        while let Some(step) = steps.next() {
            let by_hand = core.install.may_hold_anything();
            let outcome = core.install.zero(&self.layout, step.clone());
            core.waiting.starved &= outcome.pages == 0;
            self.settle(core, step.start..step.start + outcome.pages, true, demand);
            if by_hand && outcome.stopped == Some(Stop::AlreadyThere) {
                // The file has a page there that is not ours, or may have: it may hold anything.
                steps.after(outcome);
                let page = steps.skip();
                let stopped =
                    self.put_contents(core, page..page + 1, Contents::Bytes(&ZEROS[..unit]), demand);
                if stopped.is_some() {
                    self.abandon(steps.left());
                    return stopped;
                }
                continue;
            }
            let stopped = self.go_on(core, &mut steps, outcome, demand);
            if stopped.is_some() {
                return stopped;
            }
        }
        None
    }

    /// The same, for a VM that another pager may take over: an install that adds a zero page and shows it in one step would leave a page
    /// that the guest writes to, and the table knows nothing of.
    fn put_blank(&self, core: &mut Core, run: Range<u32>, demand: Demand) -> Option<Stop> {
        let unit = self.unit(run.start);
        let mut steps = Steps::new(run);
        while let Some(step) = steps.next() {
            let outcome = core.install.blank(&self.layout, step.clone());
            let blank = step.start..step.start + outcome.pages;
            let stop = steps.after(outcome);
            let exposed = if blank.is_empty() { None } else { self.expose_filled(core, blank, true, demand) };
            let stopped = match (exposed, stop) {
                // It may hold anything: what a pager wrote there that died, say.
                (None, Some(_)) => {
                    let page = steps.skip();
                    self.put_contents(core, page..page + 1, Contents::Bytes(&ZEROS[..unit]), demand)
                }
                (exposed, _) => exposed,
            };
            if stopped.is_some() {
                self.abandon(steps.left());
                return stopped;
            }
        }
        None
    }

    /// What an outcome means for pages that we have claimed: where to go on, or the end of the run.
    fn go_on(&self, core: &mut Core, steps: &mut Steps, outcome: Outcome, demand: Demand) -> Option<Stop> {
        match steps.after(outcome) {
            None => None,
            Some(Stop::AlreadyThere) => {
                self.already_there(core, steps.skip(), demand);
                None
            }
            Some(stop) => {
                self.abandon(steps.left());
                self.stopped(core, steps.left(), stop, demand);
                Some(stop)
            }
        }
    }

    /// Someone was first. The page is there, and whoever waits for it has perhaps not been told.
    fn already_there(&self, core: &mut Core, page: u32, demand: Demand) {
        self.stats.counters.already_there.add(1);
        if self.pages.state(page) == PageState::InFlight {
            self.paid(1);
        }
        self.pages.settle(page);
        core.deliveries.release(&self.layout, page..page + 1);
        self.released(core, &(page..page + 1), demand, PageClass::Resident);
    }

    /// An install stopped for a reason that is not about one page. The pages of `run` are nobody's now.
    fn stopped(&self, core: &mut Core, run: Range<u32>, stop: Stop, demand: Demand) {
        let demanded = demand.filter(|(page, _)| run.contains(page));
        match (stop, demanded) {
            (Stop::Gone, _) => self.lost_memory(core),
            (Stop::Busy, Some((page, wait))) => core.waiting.park(page, wait.since),
            (Stop::NoMemory, demanded) => {
                if !std::mem::replace(&mut core.waiting.starved, true) {
                    self.host.report(self, Report::NoMemory { hva: self.layout.place(run.start).hva });
                }
                if let Some((page, wait)) = demanded {
                    core.waiting.park(page, wait.since);
                    if core.waiting.is_patient() {
                        // Should a huge page be there after all, put in place by the VMM itself, this releases who waits.
                        core.deliveries.release(&self.layout, page..page + 1);
                    }
                }
            }
            // The layout changed under us, and nothing is owed there any more. munmap(2) wakes nobody: who waits there
            // looks again.
            (Stop::Unmapped, _) => {
                self.removed(run.start..run.start + 1, Instant::now());
                core.deliveries.release(&self.layout, run.start..run.start + 1);
                let gone = demand.map(|(page, wait)| (page, Wait { result: FaultResult::Discarded, ..wait }));
                self.released(core, &(run.start..run.start + 1), gone, PageClass::Unknown);
            }
            // Unasked: it can be brought another time.
            (Stop::Busy | Stop::Hole | Stop::AlreadyThere | Stop::Failed(_), None) => {}
            (Stop::Hole | Stop::AlreadyThere, Some((page, wait))) => core.waiting.park(page, wait.since),
            (Stop::Failed(errno), Some((page, wait))) => {
                self.fail(core, page, wait.since, &format!("the kernel would not install it: {errno}"));
            }
        }
    }

    /// Installs zero for a page that was removed and that we have claimed.
    pub(super) fn clear(&self, core: &mut Core, page: u32, wait: Wait) {
        let outcome = core.install.zero(&self.layout, page..page + 1);
        match outcome.stopped {
            None => {
                self.stats.counters.zero_pages.add(1);
                self.stats.counters.bytes_installed.add(self.unit(page) as u64);
                self.stats.trace.record(page..page + 1, Reason::Cleared, self.now_ns(Instant::now()));
                self.cleared(page);
                core.deliveries.installed(&self.layout, page..page + 1);
                self.released(core, &(page..page + 1), Some((page, wait)), PageClass::Zero);
            }
            Some(Stop::AlreadyThere) => {
                // Its file holds something, or the guest has a page: that is what it reads from now on.
                self.cleared(page);
                self.expose_removed(core, page, wait);
            }
            Some(stop) => {
                self.pages.abandon(page);
                self.stopped(core, page..page + 1, stop, Some((page, wait)));
            }
        }
    }

    /// A page of private memory stays removed for good: should it be taken away once more without a word, CONTINUE would bring
    /// back the snapshot that its file still holds.
    fn cleared(&self, page: u32) {
        if self.backing != Backing::Private {
            self.pages.settle(page);
        } else {
            self.pages.abandon(page);
        }
    }

    fn expose_removed(&self, core: &mut Core, page: u32, wait: Wait) {
        if self.backing != Backing::Private {
            self.expose(core, page..page + 1, Some((page, wait)), PageClass::Resident);
        } else {
            core.deliveries.release(&self.layout, page..page + 1);
            self.released(core, &(page..page + 1), Some((page, wait)), PageClass::Resident);
        }
    }

    /// Lets the guest see pages that are filled, or were there before. Claims nothing: present stays present.
    pub(super) fn expose(
        &self,
        core: &mut Core,
        run: Range<u32>,
        demand: Demand,
        class: PageClass,
    ) -> Option<Stop> {
        let mut steps = Steps::new(run.clone());
        while let Some(step) = steps.next() {
            let outcome = core.install.expose(&self.layout, step.clone());
            let seen = step.start..step.start + outcome.pages;
            for page in seen.clone() {
                self.pages.settle(page);
            }
            core.deliveries.installed(&self.layout, seen);
            match steps.after(outcome) {
                None => {}
                // Counted with the whole run, below.
                Some(Stop::AlreadyThere) => self.already_there(core, steps.skip(), None),
                // What is filled stays filled: its next fault exposes it.
                Some(stop) => {
                    self.stopped(core, steps.left(), stop, demand);
                    return Some(stop);
                }
            }
        }
        self.released(core, &run, demand, class);
        None
    }

    /// Whoever asked for one of these pages goes on: his wait is over.
    fn released(&self, core: &mut Core, run: &Range<u32>, demand: Demand, class: PageClass) {
        self.released_at(core, run, demand, class, Instant::now());
    }

    fn released_at(&self, core: &mut Core, run: &Range<u32>, demand: Demand, class: PageClass, now: Instant) {
        core.served = now;
        core.fresh.add(run, class, now);
        if let Some((page, wait)) = demand
            && run.contains(&page)
        {
            self.waited(wait, class, now);
        }
    }

    /// A wait is over.
    pub(super) fn waited(&self, wait: Wait, class: PageClass, now: Instant) {
        let result = if class == PageClass::Resident { FaultResult::Present } else { wait.result };
        let ns = now.saturating_duration_since(wait.since).as_nanos() as u64;
        self.stats.released(class, result, ns);
    }

    /// Pages that were installed and exposed in one step.
    fn settle(&self, core: &mut Core, run: Range<u32>, zero: bool, demand: Demand) {
        if run.is_empty() {
            return;
        }
        for page in run.clone() {
            self.pages.settle(page);
        }
        core.deliveries.installed(&self.layout, run.clone());
        self.paid(u64::from(run.end - run.start));
        // Looked at once: a clock costs as much as all the counting.
        let now = Instant::now();
        self.account(run.clone(), zero, demand, now);
        let class = if zero { PageClass::Zero } else { PageClass::Source };
        self.released_at(core, &run, demand, class, now);
    }

    /// Counts pages that have come, and traces them.
    fn account(&self, run: Range<u32>, zero: bool, demand: Demand, now: Instant) {
        let counters = &self.stats.counters;
        let pages = u64::from(run.end - run.start);
        counters.bytes_installed.add(pages * self.unit(run.start) as u64);
        if zero {
            counters.zero_pages.add(pages);
        }
        let now = self.now_ns(now);
        let trace = &self.stats.trace;
        match demand {
            None => {
                counters.populated_pages.add(pages);
                trace.record(run, Reason::Population, now);
            }
            Some((wanted, _)) if run.contains(&wanted) => {
                if pages > 1 {
                    counters.beside_pages.add(pages - 1);
                }
                if !zero {
                    counters.source_pages.add(1);
                }
                trace.record(run.start..wanted, Reason::Beside, now);
                trace.record(wanted..wanted + 1, Reason::Demand, now);
                trace.record(wanted + 1..run.end, Reason::Beside, now);
            }
            Some(_) => {
                counters.beside_pages.add(pages);
                trace.record(run, Reason::Beside, now);
            }
        }
    }

    /// So many pages fewer are owed; the last one is worth a word.
    pub(super) fn paid(&self, pages: u64) {
        if pages == 0 {
            return;
        }
        // Never below nothing: a VMM that scribbles over its page table has pages brought twice.
        let less = |owed: u64| Some(owed.saturating_sub(pages));
        let owed = self.owed.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).unwrap_or_default();
        if owed > 0 && owed <= pages {
            self.host.report(self, Report::Full);
        }
    }

    /// Gives claimed pages back, nothing having been written.
    pub(super) fn abandon(&self, pages: Range<u32>) {
        for page in pages {
            self.pages.abandon(page);
        }
    }
}
