//! Faults that are resolved on the threads that take them, inside the VMM: the delivery `exit`.
//!
//! There is no gate: see [`Exits`]. `docs/session.md` has the reasoning.

mod passes;
#[cfg(test)]
mod tests;
mod turns;
mod word;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::answer::checked;
use super::place::all_zero;
use crate::install::{Install, Stop, ZEROS};
use crate::memory::{Claim, Layout, PageState, Pages};
use crate::source::{Answer, Source};
use passes::Passes;
use turns::Turns;

/// Lines for those inside, and words for those who wait: more threads than that share some.
const LINES: usize = 256;
const WORDS: usize = 256;

/// Why a page is not there though its fault was resolved as far as it could be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unresolved {
    /// It cannot be had: whoever touches it must not go on as if it were there.
    #[error("page {page} cannot be had: {reason}")]
    Failed {
        /// By its index.
        page: u32,
        /// What the source or the kernel said, or that it failed before.
        reason: String,
    },
    /// The machine has no memory for it: try again later.
    #[error("no memory for page {page}")]
    NoMemory {
        /// By its index.
        page: u32,
    },
    /// Nothing is registered there (any more), or its process has gone.
    #[error("page {page} is in no registered range")]
    Unmapped {
        /// By its index.
        page: u32,
    },
}

/// One VM whose faults its own threads resolve: in a memory-fault exit, or a SIGBUS.
///
/// Threads claim, fill and expose at the same time: each step of a page's state is atomic, so that a page is brought by one of
/// them, and installs of different pages do not meet. What the gate of a [`Session`](super::Session) is for are discards whose events
/// the kernel reports from elsewhere. Here the VMM discards, and says so before: [`removed`](Self::removed) waits until no resolution
/// is under way that could have begun before, and nobody can begin one that does not see the mark. So register without
/// `UFFD_FEATURE_EVENT_REMOVE`.
///
/// For anonymous memory, and for shared memory of a file. In a private mapping of a file a discarded page shows the file's, and
/// nobody is told.
///
/// [`resolve`](Self::resolve) allocates nothing where the source does not, and takes no lock, so that it may run in the handler of a
/// synchronous signal.
pub struct Exits {
    layout: Layout,
    pages: Pages,
    source: Arc<dyn Source>,
    install: Box<dyn Install>,
    /// Pages that are brought together at most.
    window: u64,
    passes: Passes,
    turns: Turns,
    brought: AtomicU64,
}

impl Exits {
    /// For a VM with this layout. A page comes with those absent ones that follow it in an aligned window of so many bytes.
    pub fn new(layout: Layout, source: Arc<dyn Source>, install: Box<dyn Install>, window: u64) -> Self {
        Self {
            pages: Pages::new(layout.pages()),
            layout,
            source,
            install,
            window,
            passes: Passes::new(LINES),
            turns: Turns::new(WORDS),
            brought: AtomicU64::new(0),
        }
    }

    /// Its regions.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The states of its pages.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// How many pages have come.
    pub fn brought(&self) -> u64 {
        self.brought.load(Ordering::Relaxed)
    }

    /// Resolves a fault on the thread that took it, waiting for the source or for another thread where it must. Returns pages that are
    /// there now, the one that was asked for among them: whoever exposes pages himself exposes these.
    ///
    /// `number` tells threads apart, the number of a vCPU say. `buffer` holds a page of the largest size at least.
    ///
    /// # Errors
    /// [`Unresolved`].
    ///
    /// # Panics
    /// Where there is no such page.
    pub fn resolve(&self, page: u32, number: usize, buffer: &mut [u8]) -> Result<Range<u32>, Unresolved> {
        loop {
            let pass = self.passes.enter(number);
            let resolved = match self.pages.claim(page) {
                Claim::Fill => self.bring(page, buffer),
                Claim::Clear => self.put(page..page + 1, Answer::Zero(self.unit(page) as u64)),
                Claim::Expose | Claim::Present => match self.expose(page..page + 1) {
                    None => {
                        self.came(page..page + 1);
                        Ok(page..page + 1)
                    }
                    Some(Stop::Busy) => Ok(page..page),
                    Some(Stop::NoMemory) => Err(Some(Unresolved::NoMemory { page })),
                    Some(_) => Err(Some(Unresolved::Unmapped { page })),
                },
                Claim::Failed => {
                    let reason = "it could not be had before".to_owned();
                    Err(Some(Unresolved::Failed { page, reason }))
                }
                Claim::Wait => Err(None),
            };
            drop(pass);
            match resolved {
                Ok(pages) if pages.contains(&page) => return Ok(pages),
                Err(Some(unresolved)) => return Err(unresolved),
                // The kernel refuses it for a moment: another thread changes the mapping.
                Ok(_) => std::thread::yield_now(),
                Err(None) => {
                    let brought =
                        || matches!(self.pages.state(page), PageState::InFlight | PageState::Clearing);
                    self.turns.wait(page, brought);
                }
            }
        }
    }

    /// The VMM is about to discard pages. Once this returns they are never again what the source holds: discard them then.
    ///
    /// It waits until every resolution that is under way has ended. Not to be called by a thread that is resolving.
    pub fn removed(&self, pages: Range<u32>) {
        let _closed = self.passes.close();
        for page in pages {
            self.pages.remove(page);
        }
    }

    fn unit(&self, page: u32) -> usize {
        self.layout.place(page).page_size.bytes() as usize
    }

    /// Brings a page that was claimed, and those that come with it. `Ok` of nothing where the kernel refuses it for now.
    fn bring(&self, page: u32, buffer: &mut [u8]) -> Result<Range<u32>, Option<Unresolved>> {
        let place = self.layout.place(page);
        let unit = place.page_size.bytes();
        let window = self.window.max(unit);
        let most = ((window - place.offset % window).min(buffer.len() as u64) / unit).max(1) as u32;
        let limit = page.saturating_add(most).min(self.layout.region_end(page));
        let mut end = page + 1;
        while end < limit && self.pages.claim_absent(end) {
            end += 1;
        }
        let (asked, unit) = ((end - page) as usize * unit as usize, unit as usize);
        let answer = checked(|| self.source.wait(place.offset, asked, unit, buffer), asked, unit, false);
        match answer {
            Ok(answer) => {
                let came = page + answer.pages(unit);
                self.give_back(came..end);
                self.put(page..came, answer)
            }
            Err(reason) => {
                self.give_back(page + 1..end);
                Err(Some(self.fail(page, reason)))
            }
        }
    }

    /// Installs claimed pages, zero pages as zero, and says which are there now: those from the first on. The rest is nobody's again.
    fn put(&self, run: Range<u32>, answer: Answer<'_>) -> Result<Range<u32>, Option<Unresolved>> {
        let unit = self.unit(run.start);
        let bytes_of = |pages: Range<u32>| match answer {
            Answer::Bytes(bytes) => Some(
                &bytes[(pages.start - run.start) as usize * unit..(pages.end - run.start) as usize * unit],
            ),
            _ => None,
        };
        let is_zero = |page: u32| bytes_of(page..page + 1).is_none_or(all_zero);
        let mut at = run.start;
        while at < run.end {
            let zero = is_zero(at);
            let end = (at + 1..run.end).find(|page| is_zero(*page) != zero).unwrap_or(run.end);
            let (came, stopped) = match bytes_of(at..end).filter(|_| !zero) {
                Some(contents) => self.put_contents(at, contents, unit),
                None => self.put_zero(at..end, unit),
            };
            at = came;
            let Some(stop) = stopped else { continue };
            let failed = match stop {
                Stop::Busy => None,
                Stop::NoMemory => Some(Unresolved::NoMemory { page: at }),
                Stop::Unmapped | Stop::Gone => Some(Unresolved::Unmapped { page: at }),
                // What came with it can be asked for again.
                stop if at == run.start => {
                    Some(self.fail(at, format!("the kernel would not install it: {stop:?}")))
                }
                _ => None,
            };
            self.give_back(at..run.end);
            return if at == run.start && failed.is_some() { Err(failed) } else { Ok(run.start..at) };
        }
        Ok(run)
    }

    /// Fills and exposes claimed pages; returns one past the last that is there, and what stopped it.
    fn put_contents(&self, first: u32, contents: &[u8], unit: usize) -> (u32, Option<Stop>) {
        let (mut at, end) = (first, first + (contents.len() / unit) as u32);
        while at < end {
            let outcome = self.install.fill(&self.layout, at, &contents[(at - first) as usize * unit..]);
            let done = at..at + outcome.pages;
            if !self.install.fill_exposes() {
                // Filled is stored after the contents and before anything is exposed.
                for page in done.clone() {
                    self.pages.filled(page);
                }
                if let Some(stop) = self.expose(done.clone()) {
                    return (at, Some(stop));
                }
            }
            self.came(done.clone());
            at = done.end;
            match outcome.stopped {
                None => {}
                // Somebody was first: KVM's own access, or the VMM's.
                Some(Stop::AlreadyThere) => {
                    self.came(at..at + 1);
                    at += 1;
                }
                Some(stop) => return (at, Some(stop)),
            }
        }
        (end, None)
    }

    /// The same for pages that are zero.
    fn put_zero(&self, pages: Range<u32>, unit: usize) -> (u32, Option<Stop>) {
        let mut at = pages.start;
        while at < pages.end {
            let outcome = self.install.zero(&self.layout, at..pages.end);
            self.came(at..at + outcome.pages);
            at += outcome.pages;
            match outcome.stopped {
                None => {}
                // The file has a page there that is not the guest's yet, and may hold anything.
                Some(Stop::AlreadyThere)
                    if !self.install.fill_exposes() && self.pages.state(at) == PageState::InFlight =>
                {
                    let (came, stopped) = self.put_contents(at, &ZEROS[..unit], unit);
                    at = came;
                    if stopped.is_some() {
                        return (at, stopped);
                    }
                }
                // What is there is what it reads from now on.
                Some(Stop::AlreadyThere) => {
                    if let Some(stop) = self.expose(at..at + 1) {
                        return (at, Some(stop));
                    }
                    self.came(at..at + 1);
                    at += 1;
                }
                Some(stop) => return (at, Some(stop)),
            }
        }
        (at, None)
    }

    /// Lets the guest see pages that are filled or were there before.
    fn expose(&self, pages: Range<u32>) -> Option<Stop> {
        let mut at = pages.start;
        while at < pages.end {
            let outcome = self.install.expose(&self.layout, at..pages.end);
            at += outcome.pages;
            match outcome.stopped {
                None => {}
                Some(Stop::AlreadyThere) => at += 1,
                Some(stop) => return Some(stop),
            }
        }
        None
    }

    /// Pages are there: whoever waits for one goes on.
    fn came(&self, pages: Range<u32>) {
        let mut brought = 0;
        for page in pages {
            brought += u64::from(self.pages.settle(page));
            self.turns.over(page);
        }
        self.brought.fetch_add(brought, Ordering::Relaxed);
    }

    /// Claimed pages that did not come are nobody's again: whoever waits for one claims it.
    fn give_back(&self, pages: Range<u32>) {
        for page in pages {
            self.pages.abandon(page);
            self.turns.over(page);
        }
    }

    fn fail(&self, page: u32, reason: String) -> Unresolved {
        self.pages.fail(page);
        self.turns.over(page);
        Unresolved::Failed { page, reason }
    }
}
