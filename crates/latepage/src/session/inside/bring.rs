//! From a claim to a page that everyone sees.
//!
//! A page that was claimed here is settled, abandoned or failed when these functions return: none stays in flight for nobody.
//! Nothing here allocates where the source does not, nor takes a lock: it may run in the handler of a synchronous signal.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::super::answer::{NoAnswer, answered, at_hand, vouched};
use super::super::place::Contents;
use super::desk::{Desk, Tally};
use super::error::Reason;
use super::{Resolver, Unresolved};
use crate::install::{Install, Outcome, Stop, ZEROS};
use crate::memory::PageState;
use crate::source::{Answer, AtHand, all_zero};

/// How long the kernel may have no memory for a page before it counts as one that cannot be had.
const NO_MEMORY: Duration = Duration::from_secs(10);

/// Bytes of a page.
const PAGE: usize = 4096;

/// What a seat is about.
#[derive(Clone, Copy)]
pub(super) struct Errand<'a> {
    pub(super) desk: &'a Desk,
    /// The page that is wanted.
    pub(super) page: u32,
}

impl Errand<'_> {
    /// Counts pages that are about to come: the kernel lets some of those who wait go on by itself, and they may look.
    fn count(&self, kind: &Tally, run: &Range<u32>) {
        kind.add(u64::from(run.end - run.start));
        self.desk.beside.add(self.beside(run));
    }

    /// Of these, some have not come.
    fn take_back(&self, kind: &Tally, rest: &Range<u32>) {
        kind.take_back(u64::from(rest.end - rest.start));
        self.desk.beside.take_back(self.beside(rest));
    }

    fn beside(&self, run: &Range<u32>) -> u64 {
        u64::from(run.end - run.start) - u64::from(run.contains(&self.page))
    }
}

impl Resolver {
    /// Brings the page, which we have claimed, and with it absent ones behind it. False where it was discarded meanwhile.
    pub(super) fn supply(&self, errand: Errand<'_>, scratch: &mut [u8]) -> Result<bool, Unresolved> {
        let page = errand.page;
        let offset = self.layout.place(page).offset;
        let left = ((self.window.0 - offset % self.window.0) / PAGE as u64) as u32;
        let limit = page.saturating_add(left).min(self.layout.region_end(page));
        let mut end = page + 1;
        while end < limit && self.pages.claim_absent(end) {
            end += 1;
        }
        let came = self.bring(errand, scratch, offset, page..end);
        self.give_back(*came.as_ref().unwrap_or(&(page + 1))..end);
        match came {
            Ok(_) => Ok(self.pages.state(page) == PageState::Present),
            Err(reason) => Err(self.fail(page, reason)),
        }
    }

    /// Brings the first pages of a claimed run, one at least, and returns one past the last. On an error the first is to be failed.
    fn bring(
        &self,
        errand: Errand<'_>,
        scratch: &mut [u8],
        offset: u64,
        run: Range<u32>,
    ) -> Result<u32, Reason> {
        let (source, length) = (&*self.source, run.len() * PAGE);
        match at_hand(source, offset, length, PAGE) {
            Some(AtHand::Contents(window)) => {
                let part = first(&run, window.len() as u64);
                if let Some(came) = self.put(errand, part, Contents::Window(window))? {
                    return Ok(came);
                }
                // It has gone from memory since: the source reads it.
            }
            Some(AtHand::Zero(bytes)) => return self.put_zero(errand, first(&run, bytes)),
            None => {}
        }
        let length = length.min(scratch.len());
        let answer = match answered(|| source.ask(offset, length, PAGE, &mut *scratch), length, PAGE, true)? {
            Answer::Bytes(bytes) => Answer::Bytes(bytes),
            Answer::Zero(bytes) => Answer::Zero(bytes),
            Answer::Later => answered(|| source.wait(offset, length, PAGE, scratch), length, PAGE, false)?,
        };
        match answer {
            Answer::Zero(bytes) => self.put_zero(errand, first(&run, bytes)),
            Answer::Bytes(bytes) => self.put_bytes(errand, first(&run, bytes.len() as u64), bytes),
            Answer::Later => Err(NoAnswer::Later.into()),
        }
    }

    /// The same with bytes that were read: pages that are zero come as zero.
    fn put_bytes(&self, errand: Errand<'_>, run: Range<u32>, bytes: &[u8]) -> Result<u32, Reason> {
        let part = |pages: Range<u32>| {
            let at = |page: u32| (page - run.start) as usize * PAGE;
            &bytes[at(pages.start)..at(pages.end)]
        };
        let is_zero = |page: u32| all_zero(part(page..page + 1));
        let mut at = run.start;
        while at < run.end {
            let zero = is_zero(at);
            let end = (at + 1..run.end).find(|page| is_zero(*page) != zero).unwrap_or(run.end);
            let came = if zero {
                self.put_zero(errand, at..end).map(Some)
            } else {
                self.put(errand, at..end, Contents::Bytes(part(at..end)))
            };
            match came {
                Ok(Some(came)) if came == end => at = end,
                Ok(Some(came)) => return Ok(came),
                // What came before is there. Whoever wants the rest hears of it.
                Ok(None) | Err(_) if at > run.start => return Ok(at),
                Ok(None) => return Err(Stop::Hole.into()),
                Err(reason) => return Err(reason),
            }
        }
        Ok(run.end)
    }

    /// The same with contents none of which is known to be zero. `None` where a window shows nothing (any more).
    fn put(
        &self,
        errand: Errand<'_>,
        run: Range<u32>,
        contents: Contents<'_>,
    ) -> Result<Option<u32>, Reason> {
        let install = &*self.install;
        let filled = &errand.desk.filled;
        errand.count(filled, &run);
        let outcome = patiently(|| contents.fill(install, &self.layout, run.start, 0..run.len() * PAGE));
        let came = match outcome {
            Ok(Outcome { pages: 0, stopped: Some(Stop::AlreadyThere) }) => {
                self.put_over(run.start, contents).map(Some)
            }
            Ok(Outcome { pages: 0, stopped: Some(Stop::Hole) })
                if matches!(contents, Contents::Window(_)) =>
            {
                Ok(None)
            }
            Ok(Outcome { pages: 0, stopped }) => Err(stopped.unwrap_or(Stop::Hole).into()),
            Ok(Outcome { pages, .. }) => {
                self.filled(install, run.start..run.start + pages, contents).map(Some)
            }
            Err(reason) => Err(reason),
        };
        let end = if let Ok(Some(end)) = came { end } else { run.start };
        errand.take_back(filled, &(end..run.end));
        came
    }

    /// The memory file has a page there already that is not ours: it may hold anything, and is written over where that can be done
    /// before anybody sees it.
    fn put_over(&self, page: u32, contents: Contents<'_>) -> Result<u32, Reason> {
        let run = page..page + 1;
        let Some(over) = &self.over else {
            // Somebody has brought it by himself, or was let write there: it is what he sees.
            self.disarmed(run)?;
            return Ok(page + 1);
        };
        match patiently(|| contents.fill(&**over, &self.layout, page, 0..PAGE))? {
            Outcome { pages: 0, stopped } => Err(stopped.unwrap_or(Stop::Hole).into()),
            Outcome { .. } => self.filled(&**over, run, contents),
        }
    }

    /// Claimed pages hold their contents: everybody is let see them, once the source has vouched for them. Returns one past the last
    /// that came, one page at least.
    fn filled(&self, install: &dyn Install, run: Range<u32>, contents: Contents<'_>) -> Result<u32, Reason> {
        if matches!(contents, Contents::Window(_)) {
            // No vCPU sees it before that where there is a trap: it is armed yet.
            vouched(&*self.source).inspect_err(|_| self.spoil(run.clone()))?;
        }
        if install.fill_exposes() {
            self.disarmed(run.clone())?;
            return Ok(run.end);
        }
        let mut at = run.start;
        while at < run.end {
            let end = (at..run.end).find(|page| !self.pages.filled(*page)).unwrap_or(run.end);
            if let Err(reason) = self.show(at..end) {
                self.spoil(at..run.end);
                return if at > run.start { Ok(at) } else { Err(reason) };
            }
            self.settled(at..end);
            if end < run.end {
                // Discarded meanwhile: its next fault finds zero.
                self.release(end..end + 1);
            }
            at = end + 1;
        }
        Ok(run.end)
    }

    /// Brings zero for the first pages of a claimed run, one at least, and returns one past the last.
    fn put_zero(&self, errand: Errand<'_>, run: Range<u32>) -> Result<u32, Reason> {
        let zero = &errand.desk.zero;
        errand.count(zero, &run);
        let mut at = run.start;
        let mut stopped = None;
        while at < run.end && stopped.is_none() {
            let done = patiently(|| self.install.zero(&self.layout, at..run.end)).and_then(|outcome| {
                self.disarmed(at..at + outcome.pages)?;
                at += outcome.pages;
                match outcome.stopped {
                    None => Ok(()),
                    Some(Stop::AlreadyThere) => {
                        at = self.put_over(at, Contents::Bytes(&ZEROS[..PAGE]))?;
                        Ok(())
                    }
                    Some(stop) => Err(stop.into()),
                }
            });
            stopped = done.err();
        }
        errand.take_back(zero, &(at..run.end));
        match stopped {
            Some(reason) if at == run.start => Err(reason),
            _ => Ok(at),
        }
    }

    /// Brings zero for the page, which was discarded, and which we have claimed. False where it was discarded once more.
    pub(super) fn clear(&self, errand: Errand<'_>) -> Result<bool, Unresolved> {
        let (page, run) = (errand.page, errand.page..errand.page + 1);
        errand.count(&errand.desk.zero, &run);
        let cleared = patiently(|| self.install.zero(&self.layout, run.clone())).and_then(|outcome| {
            match outcome.stopped {
                None => self.disarmed(run.clone()),
                // Whoever filled it before it was discarded; a hole is punched there in a moment.
                Some(Stop::AlreadyThere) => {
                    self.show(run.clone())?;
                    self.settled(run.clone());
                    Ok(())
                }
                Some(stop) => Err(stop.into()),
            }
        });
        match cleared {
            Ok(()) => Ok(self.pages.state(page) == PageState::Present),
            Err(reason) => {
                errand.take_back(&errand.desk.zero, &run);
                Err(self.fail(page, reason))
            }
        }
    }

    /// Lets everyone see pages whose contents are in place: the guest view first, since a vCPU that finds nothing there would wait
    /// for the userfaultfd.
    pub(super) fn show(&self, run: Range<u32>) -> Result<(), Reason> {
        let install = self.over.as_deref().unwrap_or(&*self.install);
        let mut at = run.start;
        while at < run.end {
            let outcome = patiently(|| install.expose(&self.layout, at..run.end))?;
            at += outcome.pages;
            match outcome.stopped {
                None => {}
                // In the guest view it is; who waits for it has perhaps not been told.
                Some(Stop::AlreadyThere) => {
                    self.release(at..at + 1);
                    at += 1;
                }
                Some(stop) => return Err(stop.into()),
            }
        }
        self.disarm(run)
    }

    /// Pages that are in the guest view already: whoever asked for them goes on.
    fn disarmed(&self, run: Range<u32>) -> Result<(), Reason> {
        self.disarm(run.clone()).inspect_err(|_| self.spoil(run.clone()))?;
        self.settled(run);
        Ok(())
    }

    fn disarm(&self, run: Range<u32>) -> Result<(), Reason> {
        match &self.trap {
            Some(trap) if !run.is_empty() => trap.disarm(&self.layout, run).map_err(Reason::Trap),
            _ => Ok(()),
        }
    }

    fn settled(&self, run: Range<u32>) {
        for page in run.clone() {
            self.pages.settle(page);
        }
        self.turns.over(run);
    }

    /// The page cannot be had. Whoever waits for it learns so: vCPUs by their threads, KVM and the VMM by an error in place of it.
    fn fail(&self, page: u32, reason: Reason) -> Unresolved {
        self.spoil(page..page + 1);
        self.unresolved(page, reason)
    }

    /// The same of pages that cannot be asked for again, whatever has become of them.
    fn spoil(&self, run: Range<u32>) {
        for page in run.clone() {
            self.pages.fail(page);
            self.poison(page);
        }
        self.turns.over(run);
    }

    /// An error for whoever waits in the kernel for a page that cannot be had. Its trap stays armed.
    pub(super) fn poison(&self, page: u32) {
        // Where accesses are signals, they go on being such. Linux before 6.6 knows no poison: who waits in the kernel then waits on,
        // and never reads zero.
        if self.messages.is_some() {
            let _ = self.install.poison(&self.layout, page..page + 1);
        }
    }

    /// Claimed pages that did not come can be asked for again.
    fn give_back(&self, run: Range<u32>) {
        for page in run.clone() {
            self.pages.abandon(page);
        }
        self.release(run);
    }
}

/// The first pages of a run, as many as so many bytes are.
fn first(run: &Range<u32>, bytes: u64) -> Range<u32> {
    run.start..run.start + (bytes / PAGE as u64) as u32
}

/// Calls until the kernel says something that will not be different in a moment.
fn patiently(call: impl Fn() -> Outcome) -> Result<Outcome, Reason> {
    let (mut began, mut pause): (Option<Instant>, _) = (None, Duration::from_micros(50));
    loop {
        match call() {
            Outcome { pages: 0, stopped: Some(stop @ (Stop::Busy | Stop::NoMemory)) } => {
                if began.get_or_insert_with(Instant::now).elapsed() > NO_MEMORY {
                    return Err(stop.into());
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(20));
            }
            Outcome { pages, stopped: Some(Stop::Busy | Stop::NoMemory) } => {
                return Ok(Outcome { pages, stopped: None });
            }
            outcome => return Ok(outcome),
        }
    }
}
