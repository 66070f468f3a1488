//! From a claim to a page that everyone sees.
//!
//! A page that was claimed here is settled, abandoned or failed when these functions return: none stays in flight for nobody.

use std::ops::Range;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::super::answer::{at_hand, checked, vouched};
use super::{Desk, Resolver, Unresolved};
use crate::install::{Install, Outcome, Stop, ZEROS};
use crate::memory::PageState;
use crate::source::{Answer, AtHand};
use crate::sys::mapping::Window;

const PAGE: usize = 4096;
/// How long the kernel may have no memory for a page before it counts as one that cannot be had.
const NO_MEMORY: Duration = Duration::from_secs(10);

/// What a source gave for a run of pages, as it goes on its way.
enum Contents<'a> {
    Window(Window<'a>),
    Bytes(&'a [u8]),
    Zero,
}

impl Resolver {
    /// Brings a page that we have claimed, and with it absent ones behind it. False where it was discarded meanwhile.
    pub(super) fn supply(&self, desk: &Desk, scratch: &mut [u8], page: u32) -> Result<bool, Unresolved> {
        let place = self.layout.place(page);
        let window = self.window.0;
        let left = ((window - place.offset % window) / PAGE as u64) as u32;
        let limit = page.saturating_add(left).min(self.layout.region_end(page));
        let mut end = page + 1;
        while end < limit && self.pages.claim_absent(end) {
            end += 1;
        }
        let came = match self.bring(desk, scratch, place.offset, page..end) {
            Ok(came) => came,
            Err(reason) => {
                for beside in page + 1..end {
                    // What is filled, and could not be exposed, cannot be asked for again.
                    if self.pages.state(beside) == PageState::Filled {
                        self.pages.fail(beside);
                    }
                }
                self.give_back(page + 1..end);
                return Err(self.fail(page, reason));
            }
        };
        self.give_back(came..end);
        Ok(self.pages.state(page) == PageState::Present)
    }

    /// Brings the first pages of a claimed run, one at least, and returns one past the last. On an error none but the first is to
    /// be failed.
    fn bring(&self, desk: &Desk, scratch: &mut [u8], offset: u64, run: Range<u32>) -> Result<u32, String> {
        let (source, length) = (&*self.source, run.len() * PAGE);
        match at_hand(source, offset, length, PAGE) {
            Some(AtHand::Contents(window)) => {
                let filled = self.fill(run.start, &Contents::Window(window));
                // Before anybody sees it.
                vouched(source)?;
                match filled {
                    Ok(pages) => return self.filled(desk, run.start..run.start + pages),
                    // It has gone from memory since: the source reads it.
                    Err(Stop::Hole) => {}
                    Err(stop) => return Err(words(stop)),
                }
            }
            Some(AtHand::Zero(bytes)) => return self.zero(desk, first(&run, bytes as usize)),
            None => {}
        }
        let length = length.min(scratch.len());
        let asked = checked(|| source.ask(offset, length, PAGE, &mut *scratch), length, PAGE, true)?;
        let answer = match asked {
            Answer::Bytes(bytes) => Answer::Bytes(bytes),
            Answer::Zero(bytes) => Answer::Zero(bytes),
            Answer::Later => checked(|| source.wait(offset, length, PAGE, scratch), length, PAGE, false)?,
        };
        match answer {
            Answer::Zero(bytes) => self.zero(desk, first(&run, bytes as usize)),
            Answer::Bytes(bytes) => {
                let pages = self.fill(run.start, &Contents::Bytes(bytes)).map_err(words)?;
                self.filled(desk, run.start..run.start + pages)
            }
            Answer::Later => Err("the source has a fault: it did not wait".into()),
        }
    }

    /// Writes contents through the install view: how many pages, one at least.
    fn fill(&self, page: u32, contents: &Contents<'_>) -> Result<u32, Stop> {
        let outcome = match contents {
            Contents::Window(window) => self.install.fill_window(&self.layout, page, *window),
            Contents::Bytes(bytes) => self.install.fill(&self.layout, page, bytes),
            Contents::Zero => self.install.fill(&self.layout, page, &ZEROS[..PAGE]),
        };
        match outcome {
            Outcome { pages: 0, stopped } => Err(stopped.unwrap_or(Stop::Hole)),
            Outcome { pages, .. } => Ok(pages),
        }
    }

    /// Claimed pages hold their contents: they are stored as filled, and then exposed. Returns the end of the run.
    fn filled(&self, desk: &Desk, run: Range<u32>) -> Result<u32, String> {
        // Before anybody goes on, and looks at the counts.
        desk.filled.add(u64::from(run.end - run.start));
        desk.beside.add(u64::from(run.end - run.start - 1));
        let mut at = run.start;
        while at < run.end {
            let end = (at..run.end).find(|page| !self.pages.filled(*page)).unwrap_or(run.end);
            self.expose(at..end)?;
            if end < run.end {
                // Discarded meanwhile: its next fault finds zero.
                self.release(end..end + 1);
            }
            at = end + 1;
        }
        Ok(run.end)
    }

    /// Claimed pages are zero. Returns the end of the run.
    fn zero(&self, desk: &Desk, run: Range<u32>) -> Result<u32, String> {
        desk.zero.add(u64::from(run.end - run.start));
        desk.beside.add(u64::from(run.end - run.start - 1));
        let mut at = run.start;
        while at < run.end {
            match self.patiently(|| self.install.zero(&self.layout, at..run.end))? {
                Outcome { pages, stopped: None } => {
                    self.disarmed(at..at + pages)?;
                    at += pages;
                }
                Outcome { pages, stopped: Some(Stop::AlreadyThere) } => {
                    self.disarmed(at..at + pages)?;
                    at += pages;
                    // The file has a page there that is not ours: it may hold anything.
                    self.fill(at, &Contents::Zero).map_err(words)?;
                    if self.pages.filled(at) {
                        self.expose(at..at + 1)?;
                    } else {
                        self.release(at..at + 1);
                    }
                    at += 1;
                }
                Outcome { stopped: Some(stop), .. } => return Err(words(stop)),
            }
        }
        Ok(run.end)
    }

    /// Brings zero for a discarded page that we have claimed. False where it was discarded once more.
    pub(super) fn clear(&self, desk: &Desk, page: u32) -> Result<bool, Unresolved> {
        desk.zero.add(1);
        let cleared =
            self.patiently(|| self.install.zero(&self.layout, page..page + 1)).and_then(|outcome| {
                match outcome.stopped {
                    None => self.disarmed(page..page + 1),
                    // Whoever filled it before it was discarded; a hole is punched there in a moment.
                    Some(Stop::AlreadyThere) => self.expose(page..page + 1),
                    Some(stop) => Err(words(stop)),
                }
            });
        match cleared {
            Ok(()) => Ok(self.pages.state(page) == PageState::Present),
            Err(reason) => Err(self.fail(page, reason)),
        }
    }

    /// Filled pages are exposed, and theirs who asked for them.
    fn expose(&self, run: Range<u32>) -> Result<(), String> {
        self.show(run.clone())?;
        self.settled(run);
        Ok(())
    }

    /// Pages that are in the guest view already.
    fn disarmed(&self, run: Range<u32>) -> Result<(), String> {
        self.disarm(run.clone())?;
        self.settled(run);
        Ok(())
    }

    fn settled(&self, run: Range<u32>) {
        for page in run.clone() {
            self.pages.settle(page);
        }
        self.waiters.notify(&run);
    }

    /// Lets everyone see pages whose contents are in place: the guest view first, since a vCPU that finds nothing there would wait
    /// for the userfaultfd.
    pub(super) fn show(&self, run: Range<u32>) -> Result<(), String> {
        let mut at = run.start;
        while at < run.end {
            let outcome = self.patiently(|| self.install.expose(&self.layout, at..run.end))?;
            at += outcome.pages;
            match outcome.stopped {
                None => {}
                // In the guest view it is; who waits for it has perhaps not been told.
                Some(Stop::AlreadyThere) => {
                    self.release(at..at + 1);
                    at += 1;
                }
                Some(stop) => return Err(words(stop)),
            }
        }
        self.disarm(run)
    }

    fn disarm(&self, run: Range<u32>) -> Result<(), String> {
        match &self.trap {
            Some(trap) if !run.is_empty() => trap
                .disarm(&self.layout, run)
                .map_err(|errno| format!("its trap could not be disarmed: {errno}")),
            _ => Ok(()),
        }
    }

    /// Calls until the kernel says something that will not be different in a moment.
    fn patiently(&self, call: impl Fn() -> Outcome) -> Result<Outcome, String> {
        let (mut began, mut pause): (Option<Instant>, _) = (None, Duration::from_micros(50));
        loop {
            match call() {
                Outcome { pages: 0, stopped: Some(stop @ (Stop::Busy | Stop::NoMemory)) } => {
                    if began.get_or_insert_with(Instant::now).elapsed() > NO_MEMORY {
                        return Err(words(stop));
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

    /// The page cannot be had. Whoever waits for it learns so: vCPUs by their threads, KVM and the VMM by an error in place of it.
    fn fail(&self, page: u32, reason: String) -> Unresolved {
        self.pages.fail(page);
        self.poison(page);
        self.waiters.notify(&(page..page + 1));
        self.unresolved(page, reason)
    }

    /// An error for whoever waits in the kernel for a page that cannot be had. Its trap stays armed.
    pub(super) fn poison(&self, page: u32) {
        // Linux before 6.6 knows no poison: who waits in the kernel then waits on, and never reads zero.
        let _ = self.install.poison(&self.layout, page..page + 1);
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
fn first(run: &Range<u32>, bytes: usize) -> Range<u32> {
    run.start..run.start + (bytes / PAGE) as u32
}

fn words(stop: Stop) -> String {
    match stop {
        Stop::NoMemory => "the kernel has no memory for it".into(),
        Stop::Busy => format!("the kernel would not install it: {}", Errno::AGAIN),
        Stop::Failed(errno) => format!("the kernel would not install it: {errno}"),
        stop => format!("the kernel would not install it: {stop:?}"),
    }
}
