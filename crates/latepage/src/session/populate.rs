//! Population: pages that are brought before anyone asks.
//!
//! Contents are read outside the gate, and nothing is claimed for that: a fault on the same page is served meanwhile as if
//! population were not there. It holds the gate for one short slice at a time.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::answer::{at_hand, checked};
use super::report::Report;
use super::{Core, Scratch, Session};
use crate::install::Stop;
use crate::source::{Answer, AtHand};
use crate::sys::mapping::Window;

/// Read at a time.
const READ: u64 = 1 << 20;
/// Taken at a time of what need not be read: then other sessions have their turn.
const AT_HAND: u64 = 4 << 20;
/// As many pages, of the smallest size.
const MOST: u32 = (AT_HAND >> 12) as u32;
/// Installed at a time: about what a wake-up costs, since a fault of this VM may have to wait for it. A page of 2 MiB is one slice.
const SLICE: u64 = 128 << 10;
/// How often a slice may be doubled while the VM has no fault: up to 512 KiB, some 150 µs.
const DOUBLINGS: u32 = 2;

/// What population installs.
#[derive(Clone, Copy)]
enum Contents<'a> {
    /// What a source answered.
    Answer(Answer<'a>),
    /// What it has at hand, which only the kernel reads.
    Window(Window<'a>),
}

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
    /// Brings the next absent pages of `range`, a few megabytes at most, and moves its start behind them. Called on a thread that may
    /// wait for the source.
    pub fn populate(self: &Arc<Self>, range: &mut Range<u32>, scratch: &mut Scratch) -> Sliced {
        if self.end().is_some() {
            return Sliced::Done;
        }
        let absent = self.pages.absent_run(range.start, range.end, MOST);
        if absent.is_empty() {
            return Sliced::Done;
        }
        let place = self.layout.place(absent.start);
        let unit = place.page_size.bytes();
        let limit = absent.end.min(self.run_end(absent.start));
        let most = |bytes: u64| (limit - absent.start).min((bytes / unit).max(1) as u32);
        if let Some(sliced) = self.populate_at_hand(absent.start, most(AT_HAND), unit, range, scratch) {
            return sliced;
        }
        let pages = most(READ);

        let mut bytes = std::mem::take(&mut scratch.reading);
        let asked = pages as usize * unit as usize;
        let (source, wide) = (&self.source, unit as usize);
        let answer = checked(|| source.wait_ahead(place.offset, asked, wide, &mut bytes), asked, wide, false);
        let sliced = match answer {
            Ok(answer) => {
                let run = absent.start..absent.start + answer.pages(wide);
                let sliced = self.install_slices(run, Contents::Answer(answer), unit, range, scratch);
                sliced.unwrap_or(Sliced::More)
            }
            Err(reason) => {
                self.host.report(self, Report::PopulationStopped { page: absent.start, reason });
                Sliced::Stopped
            }
        };
        scratch.reading = bytes;
        sliced
    }

    /// The same, of what need not be read. `None` where nothing is at hand there.
    fn populate_at_hand(
        self: &Arc<Self>,
        first: u32,
        pages: u32,
        unit: u64,
        range: &mut Range<u32>,
        scratch: &mut Scratch,
    ) -> Option<Sliced> {
        let (offset, length) = (self.layout.place(first).offset, pages as usize * unit as usize);
        let (contents, bytes) = match at_hand(&*self.source, offset, length, unit as usize)? {
            AtHand::Contents(window) => (Contents::Window(window.map_in()), window.len() as u64),
            AtHand::Zero(bytes) => (Contents::Answer(Answer::Zero(bytes)), bytes),
        };
        self.install_slices(first..first + (bytes / unit) as u32, contents, unit, range, scratch)
    }

    /// Installs what is still absent of a run, slice by slice. `None` where a window shows nothing (any more): from the start of
    /// `range` on it must be read.
    fn install_slices(
        self: &Arc<Self>,
        run: Range<u32>,
        contents: Contents<'_>,
        unit: u64,
        range: &mut Range<u32>,
        scratch: &mut Scratch,
    ) -> Option<Sliced> {
        let Range { start: first, end } = run;
        let mut at = first;
        while at < end {
            let calm = self.calm.load(Ordering::Relaxed);
            self.calm.store((calm + 1).min(DOUBLINGS), Ordering::Relaxed);
            let slice = at..end.min(at + ((SLICE << calm) / unit).max(1) as u32);
            let stopped = self.inside(self.shard_of(slice.start), scratch, |core, _| {
                self.install_absent(core, slice.clone(), first, contents, unit as usize)
            });
            match stopped {
                None => return Some(Sliced::Done),
                Some(None) => at = slice.end,
                Some(Some(stop @ (Stop::Busy | Stop::NoMemory))) => {
                    range.start = slice.start;
                    return Some(if stop == Stop::Busy { Sliced::Wait } else { Sliced::Starved });
                }
                // It counts as removed now: the walk goes on behind it.
                Some(Some(Stop::Unmapped)) => {
                    range.start = slice.start;
                    return Some(Sliced::More);
                }
                Some(Some(Stop::Hole)) if matches!(contents, Contents::Window(_)) => {
                    range.start = slice.start;
                    return None;
                }
                // Such a page is left to the fault that asks for it, and to what comes of that.
                Some(Some(_)) => at = slice.end,
            }
            range.start = at;
        }
        range.start = end;
        Some(Sliced::More)
    }

    /// Installs what is still absent of a slice. `contents` begin at page `first`.
    fn install_absent(
        &self,
        core: &mut Core,
        slice: Range<u32>,
        first: u32,
        contents: Contents<'_>,
        unit: usize,
    ) -> Option<Stop> {
        let mut at = slice.start;
        while at < slice.end {
            if !self.pages.claim_absent(at) {
                at += 1;
                continue;
            }
            let mut end = at + 1;
            while end < slice.end && self.pages.claim_absent(end) {
                end += 1;
            }
            let part = at - first..end - first;
            let stopped = match contents {
                Contents::Answer(answer) => self.put(core, at..end, answer.part(part, unit), None),
                Contents::Window(window) => {
                    let bytes = part.start as usize * unit..part.end as usize * unit;
                    self.put_window(core, at..end, window.part(bytes), None)
                }
            };
            if stopped.is_some() {
                return stopped;
            }
            at = end;
        }
        None
    }
}
