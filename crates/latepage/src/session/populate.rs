//! Population: pages that are brought before anyone asks.
//!
//! Contents are read outside the gate, and nothing is claimed for that: a fault on the same page is served meanwhile as if
//! population were not there. It holds the gate for one short slice at a time.

use std::ops::Range;
use std::sync::Arc;

use super::answer::checked;
use super::report::Report;
use super::{Core, Scratch, Session};
use crate::install::Stop;
use crate::source::Answer;

/// Read at a time.
const READ: u64 = 1 << 20;
/// Installed at a time: about what a wake-up costs, since a fault of this VM may have to wait for it. A page of 2 MiB is one slice.
const SLICE: u64 = 64 << 10;

/// What one step of population came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sliced {
    /// There is more.
    More,
    /// The kernel refuses installs for now: go on in a moment.
    Wait,
    /// There is no memory for the next page: go on after a while.
    Starved,
    /// The range is done.
    Done,
    /// The source failed; that has been reported.
    Stopped,
}

impl Session {
    /// Brings the next absent pages of `range`, about a megabyte, and moves its start behind them. Called on a thread that may
    /// wait for the source.
    pub fn populate(self: &Arc<Self>, range: &mut Range<u32>, scratch: &mut Scratch) -> Sliced {
        if self.end().is_some() {
            return Sliced::Done;
        }
        let absent = self.pages.absent_run(range.start, range.end);
        if absent.is_empty() {
            return Sliced::Done;
        }
        let place = self.layout.place(absent.start);
        let unit = place.page_size.bytes();
        let limit = absent.end.min(self.layout.region_end(absent.start));
        let pages = (limit - absent.start).min((READ / unit).max(1) as u32);

        let mut bytes = std::mem::take(&mut scratch.reading);
        let asked = pages as usize * unit as usize;
        let (source, wide) = (&self.source, unit as usize);
        let answer = checked(|| source.wait_ahead(place.offset, asked, wide, &mut bytes), asked, wide, false);
        let sliced = match answer {
            Ok(answer) => self.install_slices(absent.start, answer, unit, range, scratch),
            Err(reason) => {
                self.host.report(self, Report::PopulationStopped { page: absent.start, reason });
                Sliced::Stopped
            }
        };
        scratch.reading = bytes;
        sliced
    }

    fn install_slices(
        self: &Arc<Self>,
        first: u32,
        answer: Answer<'_>,
        unit: u64,
        range: &mut Range<u32>,
        scratch: &mut Scratch,
    ) -> Sliced {
        let end = first + answer.pages(unit as usize);
        let mut at = first;
        while at < end {
            let slice = at..end.min(at + (SLICE / unit).max(1) as u32);
            let part = answer.part(slice.start - first..slice.end - first, unit as usize);
            let stopped =
                self.inside(scratch, |core, _| self.install_absent(core, slice.clone(), part, unit as usize));
            match stopped {
                None => return Sliced::Done,
                Some(None) => at = slice.end,
                Some(Some(stop @ (Stop::Busy | Stop::NoMemory))) => {
                    range.start = slice.start;
                    return if stop == Stop::Busy { Sliced::Wait } else { Sliced::Starved };
                }
                // It counts as removed now: the walk goes on behind it.
                Some(Some(Stop::Unmapped)) => {
                    range.start = slice.start;
                    return Sliced::More;
                }
                // Such a page is left to the fault that asks for it, and to what comes of that.
                Some(Some(_)) => at = slice.end,
            }
            range.start = at;
        }
        range.start = end;
        Sliced::More
    }

    /// Installs what is still absent of a run.
    fn install_absent(
        &self,
        core: &mut Core,
        run: Range<u32>,
        answer: Answer<'_>,
        unit: usize,
    ) -> Option<Stop> {
        let mut at = run.start;
        while at < run.end {
            if !self.pages.claim_absent(at) {
                at += 1;
                continue;
            }
            let mut end = at + 1;
            while end < run.end && self.pages.claim_absent(end) {
                end += 1;
            }
            let stopped = self.put(core, at..end, answer.part(at - run.start..end - run.start, unit), None);
            if stopped.is_some() {
                return stopped;
            }
            at = end;
        }
        None
    }
}
