//! From a claim to a page: what a source has, in as long a run as the policy allows.
//!
//! All of it happens inside the gate. A page that was claimed here is settled, abandoned, failed, or out with a ticket when
//! these functions return; none stays in flight for nobody.

use super::answer::{at_hand, checked};
use super::around::{LONGEST, PIECE, Plan};
use super::place::{Demand, Wait};
use super::policy::{FaultAround, Population};
use super::{Core, Scratch, Session};
use crate::delivery::{Fault, FaultFlags};
use crate::install::Stop;
use crate::memory::{PageState, Place};
use crate::source::{Answer, AtHand};
use crate::stats::FaultResult;
use std::ops::Range;
use std::sync::Arc;

/// A page that no session has: what comes beside a fault that was served before comes for it.
const NOBODYS: u32 = u32::MAX;

/// What is to be read of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Bytes from the start of the snapshot.
    pub offset: u64,
    /// Bytes, in whole pages.
    pub length: usize,
    /// Bytes of a page.
    pub unit: usize,
}

/// How the bringing of a run ended.
enum Ending {
    /// All of it came.
    Whole,
    /// The source would have to wait.
    Later,
    /// The source cannot supply it.
    Failed(String),
    /// The kernel would not install it, which has been seen to.
    Stopped,
}

impl Session {
    /// Bytes of each page of the region that `page` is in.
    pub(super) fn unit(&self, page: u32) -> usize {
        self.layout.place(page).page_size.bytes() as usize
    }

    /// Brings a page that we have claimed, and with it absent ones behind it: what the policy allows, and at least the `also`
    /// pages that others of the same batch wait for.
    pub(super) fn supply(
        self: &Arc<Self>,
        core: &mut Core,
        bytes: &mut [u8],
        fault: Fault,
        also: u32,
        wait: Wait,
    ) {
        let page = fault.page;
        let place = self.layout.place(page);
        let (plan, least, limit) = self.plan(core, fault, &place);
        if plan.walked > 0 {
            self.stats.counters.beside_touched.add(u64::from(plan.walked));
        }
        let wanted = plan.now.end.max(least).max(page.saturating_add(also + 1));
        let end = self.claim_behind(page, wanted.min(limit));
        let (came, ending) = self.bring(core, bytes, &place, page..end, Some((page, wait)));
        if let Some(stream) = plan.stream {
            core.around.came(stream, &plan.now, came, (came - page).saturating_sub(1));
        }
        if came > page {
            // What was only to come beside can be asked for again.
            return;
        }
        match ending {
            Ending::Later => {
                self.stats.counters.later.add(1);
                if core.waiting.ticket(page, wait.since) {
                    self.host.read_later(self, page);
                }
            }
            Ending::Failed(reason) => self.fail(core, page, wait.since, &reason),
            // Parked, failed or dropped already, as the kernel's answer says.
            Ending::Stopped | Ending::Whole => {}
        }
    }

    /// What is to come with a fault, the page before which all comes with it whatever was touched before, and the page that it must
    /// not go beyond.
    fn plan(&self, core: &mut Core, fault: Fault, place: &Place) -> (Plan, u32, u32) {
        let unit = place.page_size.bytes();
        let all = self.layout.region_pages(place.region);
        let region = all.start.max(core.pages.start)..all.end.min(core.pages.end);
        let before = (place.offset % LONGEST / unit) as u32;
        let stretch = (fault.page - before.min(fault.page - region.start))
            ..fault.page.saturating_add(((LONGEST - place.offset % LONGEST) / unit) as u32).min(region.end);
        let (fixed, limit) = match self.policy.fault_around {
            FaultAround::Auto => (None, stretch.end),
            FaultAround::Window(bytes) => {
                let window = bytes.max(unit);
                let left =
                    ((window - place.offset % window) / unit).min(Scratch::BYTES as u64 / unit).max(1) as u32;
                (Some(left.min(region.end - fault.page)), region.end)
            }
        };
        if fixed == Some(1) {
            // What comes alone follows nothing.
            return (Plan::alone(fault.page), fault.page, limit);
        }
        let absent = |page| self.pages.state(page) == PageState::Absent;
        let plan = core.around.plan(fault.page, fault.thread, place, stretch, fixed, absent);
        let mut least = fault.page;
        if self.policy.population == Population::Background && fixed.is_none() {
            // All of it comes anyway: the rest of a piece may as well come now, and spares the guest a wait or two.
            let piece = (PIECE / unit).max(1) as u32;
            let left = (piece - ((place.offset % PIECE) / unit) as u32).min(limit - fault.page);
            // Beside the plan: where it goes down, what lies behind the fault is there already, and keeps nothing from coming.
            least += left;
        }
        (plan, least, limit)
    }

    /// Claims the absent pages that follow `page`, up to the first that is not, and returns one past the last.
    fn claim_behind(&self, page: u32, limit: u32) -> u32 {
        let mut end = page + 1;
        while end < limit && self.pages.claim_absent(end) {
            end += 1;
        }
        end
    }

    /// Brings one more piece of a run whose fault has been served. Whether there is more.
    pub(super) fn bring_ahead(&self, core: &mut Core, bytes: &mut [u8]) -> bool {
        let pages_of = |page| (PIECE / self.unit(page) as u64) as u32;
        let Some((stream, piece)) = core.around.next_piece(pages_of) else { return false };
        // A run ends at the first page that is not absent: going up from the piece's start, going down from its end.
        let mut run = piece.clone();
        if core.around.goes_down(stream) {
            run.start = run.end;
            while run.start > piece.start && self.pages.claim_absent(run.start - 1) {
                run.start -= 1;
            }
        } else {
            run.end = run.start;
            while run.end < piece.end && self.pages.claim_absent(run.end) {
                run.end += 1;
            }
        }
        let mut came = run.start;
        if !run.is_empty() {
            let place = self.layout.place(run.start);
            // They come beside a fault that has been served.
            let wait = Wait { since: self.started, result: FaultResult::Installed };
            came = self.bring(core, bytes, &place, run.clone(), Some((NOBODYS, wait))).0;
        }
        core.around.piece_came(stream, &piece, came - run.start, came == run.end && run == piece);
        core.around.is_pending()
    }

    /// Brings claimed pages of a run that begins at `place`, from its first on, and returns one past the last that came, and how
    /// it ended. What did not come is nobody's again, but for the page of a demand that comes late or not at all: that one is the
    /// caller's still, where nothing came.
    fn bring(
        &self,
        core: &mut Core,
        bytes: &mut [u8],
        place: &Place,
        run: Range<u32>,
        demand: Demand,
    ) -> (u32, Ending) {
        let unit = place.page_size.bytes() as usize;
        let (mut at, mut end, mut windows) = (run.start, run.end, true);
        while at < end {
            let offset = place.offset + u64::from(at - run.start) * unit as u64;
            let length = (end - at) as usize * unit;
            let found = if windows { at_hand(&*self.source, offset, length, unit) } else { None };
            let part;
            let stopped = match found {
                Some(AtHand::Contents(window)) => {
                    part = at..at + (window.len() / unit) as u32;
                    self.put_window(core, part.clone(), window, demand)
                }
                Some(AtHand::Zero(zero)) => {
                    part = at..at + (zero / unit as u64) as u32;
                    self.put(core, part.clone(), Answer::Zero(zero), demand)
                }
                None => {
                    let length = length.min(bytes.len());
                    let (source, into) = (&*self.source, &mut *bytes);
                    match checked(move || source.ask(offset, length, unit, into), length, unit, true) {
                        Ok(answer) if answer != Answer::Later => {
                            part = at..at + answer.pages(unit);
                            self.put(core, part.clone(), answer, demand)
                        }
                        late => {
                            let kept = demand.is_some_and(|(page, _)| page == at);
                            self.abandon(at + u32::from(kept)..end);
                            let ending = late.map_or_else(Ending::Failed, |_| Ending::Later);
                            return (at, ending);
                        }
                    }
                }
            };
            match stopped {
                None => at = part.end,
                // The window showed less than it promised. The source reads the rest.
                Some(Stop::Hole) if matches!(found, Some(AtHand::Contents(_))) => {
                    windows = false;
                    at = part.clone().find(|page| self.pages.claim_absent(*page)).unwrap_or(part.end);
                    if at < part.end {
                        let claimed = self.claim_behind(at, part.end);
                        if claimed < part.end {
                            self.abandon(part.end..end);
                            end = claimed;
                        }
                    }
                }
                Some(_) => {
                    self.abandon(part.end..end);
                    let came = part.clone().find(|page| !self.is_there(*page)).unwrap_or(part.end);
                    return (came, Ending::Stopped);
                }
            }
        }
        (at, Ending::Whole)
    }

    fn is_there(&self, page: u32) -> bool {
        matches!(self.pages.state(page), PageState::Filled | PageState::Present)
    }

    /// What is to be read for a page that has to be waited for: the rest of the window that comes with it.
    pub fn wanted(&self, page: u32) -> Wanted {
        let place = self.layout.place(page);
        let unit = place.page_size.bytes() as usize;
        let window = self.policy.fault_around.window().max(unit as u64);
        let limit = self.run_end(page) - page;
        let pages =
            (((window - place.offset % window) as usize).min(Scratch::BYTES) / unit).clamp(1, limit as usize);
        Wanted { offset: place.offset, length: pages * unit, unit }
    }

    /// Reads a page that is in flight, waiting as long as it takes, and installs it. Called on a thread that may wait.
    pub fn finish_read(self: &Arc<Self>, page: u32, scratch: &mut Scratch) {
        let Wanted { offset, length, unit } = self.wanted(page);
        // The buffer leaves the scratch for as long as contents lie in it: whoever serves inside needs one too.
        let mut bytes = std::mem::take(&mut scratch.reading);
        let answer = checked(|| self.source.wait(offset, length, unit, &mut bytes), length, unit, false);
        self.finish_with(page, answer, scratch);
        scratch.reading = bytes;
    }

    /// Installs contents that somebody has read for a page that is in flight, from its first byte on, as [`wanted`](Self::wanted)
    /// says: whole pages, and no more. They are the source's, who has said so.
    pub fn finish_with_bytes(self: &Arc<Self>, page: u32, bytes: &[u8], scratch: &mut Scratch) {
        self.finish_with(page, Ok(Answer::Bytes(bytes)), scratch);
    }

    fn finish_with(self: &Arc<Self>, page: u32, answer: Result<Answer<'_>, String>, scratch: &mut Scratch) {
        self.inside(self.shard_of(page), scratch, |core, scratch| {
            let Some(waiting) = core.waiting.redeem(page) else { return };
            match (self.pages.state(page), answer) {
                (PageState::InFlight, Ok(answer)) => {
                    let limit = page + answer.pages(self.unit(page));
                    let mut end = page + 1;
                    while end < limit && self.pages.claim_absent(end) {
                        end += 1;
                    }
                    let wait = Wait { since: waiting.since, result: FaultResult::Deferred };
                    self.put(core, page..end, answer, Some((page, wait)));
                }
                // Nobody is owed it any more: the VM has gone, or its pager was closed while the source was waited for.
                (PageState::InFlight, Err(_)) if self.end().is_some() => {}
                (PageState::InFlight, Err(error)) => self.fail(core, page, waiting.since, &error),
                // Discarded while it was read, or already there: it is looked at afresh.
                (state, _) => {
                    let fault = Fault { page, flags: FaultFlags::empty(), thread: 0 };
                    let result = match state {
                        PageState::Removed | PageState::Clearing => FaultResult::Discarded,
                        _ => FaultResult::Deferred,
                    };
                    let wait = Wait { since: waiting.since, result };
                    self.fault(core, &mut scratch.bytes, fault, wait);
                }
            }
        });
    }
}
