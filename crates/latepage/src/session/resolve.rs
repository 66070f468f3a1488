//! From a claim to a page: what a source has, in as long a run as the policy allows.
//!
//! All of it happens inside the gate. A page that was claimed here is settled, abandoned, failed, or out with a ticket when
//! these functions return; none stays in flight for nobody.

use super::answer::checked;
use super::place::Wait;
use super::{Core, Scratch, Session};
use crate::delivery::{Fault, FaultFlags};
use crate::memory::PageState;
use crate::source::Answer;
use crate::stats::FaultResult;
use std::sync::Arc;

impl Session {
    /// Bytes of each page of the region that `page` is in.
    pub(super) fn unit(&self, page: u32) -> usize {
        self.layout.place(page).page_size.bytes() as usize
    }

    /// Brings a page that we have claimed, and the absent ones that follow it in its window.
    pub(super) fn supply(self: &Arc<Self>, core: &mut Core, bytes: &mut [u8], page: u32, wait: Wait) {
        let place = self.layout.place(page);
        let unit = place.page_size.bytes() as usize;
        let end = self.claim_beside(page);
        let mut at = page;
        while at < end {
            let offset = place.offset + u64::from(at - page) * unit as u64;
            let length = ((end - at) as usize * unit).min(bytes.len());
            match checked(|| self.source.ask(offset, length, unit, bytes), length, unit, true) {
                Ok(answer) if answer != Answer::Later => {
                    let run = at..at + answer.pages(unit);
                    at = run.end;
                    if self.put(core, run, answer, Some((page, wait))).is_some() {
                        return self.abandon(at..end);
                    }
                }
                Ok(_) if at == page => {
                    self.stats.counters.later.add(1);
                    core.waiting.ticket(page, wait.since);
                    self.host.read_later(self, page);
                    return self.abandon(page + 1..end);
                }
                Err(error) if at == page => {
                    self.abandon(page + 1..end);
                    return self.fail(core, page, wait.since, &error);
                }
                // What was only to come beside can be asked for again.
                Ok(_) | Err(_) => return self.abandon(at..end),
            }
        }
    }

    /// Claims the absent pages that follow `page` in its fault-around window, and returns one past the last.
    fn claim_beside(&self, page: u32) -> u32 {
        let place = self.layout.place(page);
        let unit = place.page_size.bytes();
        let window = self.policy.fault_around.max(unit);
        let left = ((window - place.offset % window) / unit).min(Scratch::BYTES as u64 / unit) as u32;
        let limit = page.saturating_add(left.max(1)).min(self.layout.region_end(page));
        let mut end = page + 1;
        while end < limit && self.pages.claim_absent(end) {
            end += 1;
        }
        end
    }

    /// Installs a read that an I/O thread did for a page that is in flight. Called on that thread.
    pub fn finish_read(self: &Arc<Self>, page: u32, scratch: &mut Scratch) {
        let place = self.layout.place(page);
        let unit = place.page_size.bytes() as usize;
        let window = self.policy.fault_around.max(unit as u64);
        let limit = self.layout.region_end(page) - page;
        let pages =
            (((window - place.offset % window) as usize).min(Scratch::BYTES) / unit).clamp(1, limit as usize);
        // The buffer leaves the scratch for as long as contents lie in it: whoever serves inside needs one too.
        let mut bytes = std::mem::take(&mut scratch.reading);
        let asked = pages * unit;
        let answer = checked(|| self.source.wait(place.offset, asked, unit, &mut bytes), asked, unit, false);
        self.inside(scratch, |core, scratch| {
            let Some(waiting) = core.waiting.redeem(page) else { return };
            match (self.pages.state(page), answer) {
                (PageState::InFlight, Ok(answer)) => {
                    let limit = page + answer.pages(unit);
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
        scratch.reading = bytes;
    }
}
