//! The seat of one thread: posts what it wants, waits until that has been seen to, and exposes what only this process can.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use latepage::delivery::channel::{self, Completion, Request, Waited};
use latepage::install::{Install, MinorInstall, Outcome, Stop, Trap};
use latepage::stats::Counter;
use latepage::sys::uffd::Userfaultfd;
use rustix::io::Errno;

use super::handover::Handover;
use crate::error::VmError;
use crate::fingerprint::PAGE;
use crate::last_words;
use crate::supply::{self, Came};
use crate::trap::Attributes;

/// How often a thread looks at its slot before it sleeps there: some microseconds, in which a pager that is awake may have answered.
const SPINS: u32 = 200;

/// How often, where so many vCPUs run on so many cores: it only pays where they and the pager have a core each. Elsewhere the core is
/// somebody else's who waits for it, the pager's perhaps (`docs/performance.md`).
pub(super) fn spins(vcpus: u32, cores: usize) -> u32 {
    if (vcpus as usize) < cores { SPINS } else { 0 }
}

/// How long it sleeps before it looks whether it is to leave. The signal of a pause may come just before it falls asleep.
const LOOK: Duration = Duration::from_millis(100);

/// What all seats of one VM need.
pub(super) struct Side {
    pub(super) handover: Handover,
    /// What exposes pages in the guest view, where the pager cannot.
    pub(super) view: Option<MinorInstall>,
    /// The trap that only this process can disarm.
    pub(super) attributes: Option<Arc<Attributes>>,
    pub(super) desks: Box<[Desk]>,
    /// How often a thread looks at its slot before it sleeps.
    pub(super) spins: u32,
}

/// What one thread has to itself: a cache line, so that no two share one.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Desk {
    pub(super) exits: Counter,
    pub(super) posted: Counter,
    pub(super) removed: Counter,
    pub(super) forwarded: Counter,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Seat {
    side: Arc<Side>,
    posts: channel::Seat,
    /// The page that was posted and has not come.
    asked: Option<u32>,
    /// The thread, once it has sat down.
    thread: u32,
}

/// Why a page is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// The thread is to leave.
    Left,
    /// The pager says that it cannot be had.
    Failed,
    /// The pager does not know the page.
    Refused,
    /// What stands in the slot answers nothing that was asked.
    Garbled,
    /// It could not be mapped into the guest view.
    Unmapped(Stop),
    /// Its trap could not be disarmed.
    Armed(Errno),
}

impl fmt::Display for Missing {
    /// Allocates nothing: errno's own words would.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left => f.write_str("the thread was told to leave"),
            Self::Failed => f.write_str("its pager cannot supply it (the pager's log says why)"),
            Self::Refused => f.write_str("its pager knows no such page"),
            Self::Garbled => f.write_str("its pager wrote an answer to nothing that was asked"),
            Self::Unmapped(Stop::Failed(errno)) => {
                write!(f, "the kernel would not map it into the guest view: errno {}", errno.raw_os_error())
            }
            Self::Unmapped(stop) => write!(f, "the kernel would not map it into the guest view: {stop:?}"),
            Self::Armed(errno) => write!(f, "its trap could not be disarmed: errno {}", errno.raw_os_error()),
        }
    }
}

impl Seat {
    /// The seat of that number; none where there is no such slot, or somebody sits there.
    pub(super) fn take(side: &Arc<Side>, number: u32) -> Option<Self> {
        let posts = side.handover.channel.seat(number)?;
        Some(Self { side: Arc::clone(side), posts, asked: None, thread: 0 })
    }

    fn desk(&self) -> &Desk {
        &self.side.desks[self.posts.slot() as usize]
    }

    /// Has a page brought. Allocates nothing and takes no lock.
    fn bring(&mut self, page: u32, leave: Option<&AtomicBool>) -> Result<(), Missing> {
        if self.asked != Some(page) {
            // It may have left in the middle of another one.
            self.posts.abandon();
            if self.thread == 0 {
                self.thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
            }
            let request = Request::Fault { page, write: false, thread: self.thread };
            self.posts.post(&request).map_err(|_| Missing::Garbled)?;
            self.asked = Some(page);
            self.desk().posted.add(1);
        }
        let came = loop {
            match self.posts.wait(self.side.spins, leave.map(|_| LOOK)) {
                Waited::Over(Completion::Done(pages)) => break Ok(pages),
                Waited::Over(Completion::Failed) => break Err(Missing::Failed),
                Waited::Over(Completion::Refused) => break Err(Missing::Refused),
                Waited::Garbled => break Err(Missing::Garbled),
                Waited::Interrupted | Waited::TimedOut => {
                    if leave.is_some_and(|leave| leave.load(Ordering::Acquire)) {
                        return Err(Missing::Left);
                    }
                }
            }
        };
        self.asked = None;
        self.side.expose(page, came?)
    }

    /// The userfaultfd that is read here, where the pager has none.
    pub(super) fn userfaultfd(&self) -> Arc<Userfaultfd> {
        Arc::clone(&self.side.handover.userfaultfd)
    }

    /// Has the page of a fault brought that came by userfaultfd, and lets go on whoever waits for it there.
    pub(super) fn forward(&mut self, address: u64, leave: &AtomicBool) -> Result<(), Missing> {
        let Some(page) = self.side.handover.layout.find_hva(address) else { return Ok(()) };
        self.desk().forwarded.add(1);
        let brought = self.bring(page, Some(leave));
        match brought {
            Err(Missing::Left) => {}
            Err(_) => self.side.poison(page),
            // Who found it mapped already has woken nobody.
            Ok(()) => {
                let hva = self.side.handover.layout.place(page).hva;
                // It fails for an unaligned range alone.
                let _ = self.userfaultfd().wake(hva, PAGE);
            }
        }
        brought
    }

    /// Tells the pager that pages are about to be discarded, and waits until it has taken note.
    pub(super) fn removed(
        &mut self,
        pages: Range<u32>,
        going_on: impl Fn() -> Result<(), VmError>,
    ) -> Result<(), VmError> {
        let refused = |why: &str| Err(VmError::Discard { first: pages.start, why: why.to_owned() });
        if self.posts.post(&Request::Removed(pages.clone())).is_err() {
            return refused("another discard has not been answered");
        }
        self.desk().removed.add(1);
        loop {
            match self.posts.wait(self.side.spins, Some(LOOK)) {
                Waited::Over(Completion::Done(_)) => return Ok(()),
                Waited::Over(_) => return refused("the pager refused it"),
                Waited::Garbled => return refused("the pager wrote an answer to nothing that was asked"),
                Waited::Interrupted | Waited::TimedOut => {
                    if let Err(over) = going_on() {
                        self.posts.abandon();
                        return Err(over);
                    }
                }
            }
        }
    }
}

impl Side {
    /// Lets this thread reach pages that have come, `page` among them, as far as the pager could not. What lies in other regions is for
    /// those who ask for it.
    ///
    /// The guest view first: a vCPU that finds nothing there would wait for the userfaultfd.
    fn expose(&self, page: u32, came: Range<u32>) -> Result<(), Missing> {
        let layout = &self.handover.layout;
        let region = layout.region_pages(layout.place(page).region);
        let run = came.start.max(region.start)..came.end.min(region.end);
        // Where somebody was faster with this page, he exposes those that came with it. They come back to whoever is faster still.
        if self.show(page)? {
            self.show_beside(run.start..page);
            self.show_beside(page + 1..run.end);
        }
        if let Some(attributes) = &self.attributes {
            attributes.disarm(layout, run).map_err(Missing::Armed)?;
        }
        Ok(())
    }

    /// What a pager had read of the userfaultfd and not seen to is known to nobody since it died: whoever waits there asks again.
    pub(super) fn ask_again(&self) {
        if self.handover.hands_userfaultfd {
            for region in self.handover.layout.regions() {
                // It fails for an unaligned or empty range alone.
                let _ = self.handover.userfaultfd.wake(region.hva, region.size);
            }
        }
    }

    /// Maps a page into the guest view. Whether it was not there before.
    fn show(&self, page: u32) -> Result<bool, Missing> {
        let Some(view) = &self.view else { return Ok(false) };
        loop {
            match view.expose(&self.handover.layout, page..page + 1) {
                Outcome { pages: 1, .. } => return Ok(true),
                Outcome { stopped: Some(Stop::AlreadyThere), .. } => return Ok(false),
                Outcome { stopped: None | Some(Stop::Busy), .. } => std::thread::yield_now(),
                Outcome { stopped: Some(stop), .. } => return Err(Missing::Unmapped(stop)),
            }
        }
    }

    /// The same for pages that nobody waits for here: what cannot be mapped now comes back.
    fn show_beside(&self, pages: Range<u32>) {
        let Some(view) = &self.view else { return };
        let mut at = pages.start;
        while at < pages.end {
            let outcome = view.expose(&self.handover.layout, at..pages.end);
            at += outcome.pages;
            match outcome.stopped {
                Some(Stop::AlreadyThere) => at += 1,
                None if outcome.pages > 0 => {}
                _ => return,
            }
        }
    }

    /// An error for whoever waits in the kernel for a page that cannot be had.
    fn poison(&self, page: u32) {
        if let Some(view) = &self.view {
            // Linux before 6.6 knows no poison: who waits in the kernel then waits on, and never reads zero.
            let _ = view.poison(&self.handover.layout, page..page + 1);
        }
    }
}

impl fmt::Debug for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Side").field("handover", &self.handover).finish_non_exhaustive()
    }
}

impl supply::Seat for Seat {
    fn exit(&mut self, gpa: u64, leave: &AtomicBool) -> Came {
        self.desk().exits.add(1);
        let Some(page) = self.side.handover.layout.find_gpa(gpa) else {
            return Came::Not(format!("the guest went to {gpa:#x}, where no memory is"));
        };
        match self.bring(page, Some(leave)) {
            Ok(()) => Came::There,
            Err(Missing::Left) => Came::Left,
            Err(missing) => {
                Came::Not(format!("the memory at guest address {gpa:#x} could not be had: {missing}"))
            }
        }
    }

    fn touch(&mut self, address: u64) -> bool {
        let Some(page) = self.side.handover.layout.find_hva(address) else { return false };
        self.desk().exits.add(1);
        // Nobody can be told to leave here: the access has begun, and goes on when the page is there.
        self.bring(page, None).inspect_err(|missing| last_words::say(address, missing)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_would_keep_the_pager_from_its_core_sleeps_at_once() {
        assert_eq!([spins(1, 2), spins(63, 64)], [SPINS, SPINS]);
        assert_eq!([spins(1, 1), spins(2, 2), spins(64, 2)], [0, 0, 0]);
    }
}
