//! The page table of a session: one byte a page, each changed by single atomic steps.

use std::ops::Range;

use super::atomic::{AtomicU8, Ordering};
#[cfg(not(loom))]
use super::table::PageTable;
use super::transitions::{Claim, PageState, STATES, Step};

/// The state of every page of a session.
///
/// All methods may be called from any thread. A step is one compare-and-exchange on the page's byte, decided by the state that it
/// replaces; it is tried again only where that state was not the one expected, or another thread changed it in between. Methods
/// panic on a page that the table does not have.
///
/// A step releases what its caller wrote before it, and acquires what the thread wrote that took the step before: who finds a page
/// [`Filled`](PageState::Filled) sees its contents.
///
/// ```
/// use latepage::memory::{Claim, PageState, Pages};
///
/// let pages = Pages::new(4);
/// assert_eq!(pages.claim(2), Claim::Fill); // ours: contents come from the source
/// assert_eq!(pages.claim(2), Claim::Wait); // the next one only waits
/// assert!(pages.settle(2));
/// assert_eq!(pages.claim(2), Claim::Present);
/// assert_eq!(pages.remove(2), PageState::Present);
/// assert_eq!(pages.claim(2), Claim::Clear); // ours: zero, never the source again
/// ```
#[derive(Debug)]
pub struct Pages {
    states: States,
}

/// Where the bytes are.
#[derive(Debug)]
enum States {
    /// This process's own.
    Own(Vec<AtomicU8>),
    /// Memory of the VMM's, which it may write to at any time.
    #[cfg(not(loom))]
    Handed(PageTable),
}

/// How often a step on a page of a handed table is tried again. Steps of ours meet there twice or thrice; who changes the byte so often
/// is a VMM that scribbles, and it must not hold a worker up.
#[cfg(not(loom))]
const MOST_TRIES: u32 = 64;

impl Pages {
    /// A table of `count` absent pages. It takes `count` bytes, none of them resident before its page is first touched.
    pub fn new(count: u32) -> Self {
        // Zeroed memory straight from the allocator, taken over in place: an optimised build does not even walk it.
        let states = vec![PageState::Absent as u8; count as usize];
        Self { states: States::Own(states.into_iter().map(AtomicU8::new).collect()) }
    }

    /// A table that a VMM has handed over, in whatever states the pager before has left it: see [`take_over`](Self::take_over).
    #[cfg(not(loom))]
    pub fn handed(table: PageTable) -> Self {
        Self { states: States::Handed(table) }
    }

    /// Whether the table outlives this process.
    #[inline]
    pub fn is_handed(&self) -> bool {
        !matches!(self.states, States::Own(_))
    }

    #[inline]
    fn states(&self) -> &[AtomicU8] {
        match &self.states {
            States::Own(states) => states,
            #[cfg(not(loom))]
            States::Handed(table) => table.states(),
        }
    }

    /// How many pages there are.
    pub fn len(&self) -> u32 {
        self.states().len() as u32
    }

    /// Whether there is no page at all.
    pub fn is_empty(&self) -> bool {
        self.states().is_empty()
    }

    /// The page's state now. Another thread may have changed it before the caller looks.
    #[inline]
    pub fn state(&self, page: u32) -> PageState {
        PageState::of(self.states()[page as usize].load(Ordering::Acquire))
    }

    /// For a fault: takes the page if nobody has, or says what is to be done instead.
    #[inline]
    pub fn claim(&self, page: u32) -> Claim {
        Claim::found(self.step(page, Step::Claim))
    }

    /// For a page that nobody waits for: takes it if it is absent. True where it is the caller's now, as with [`Claim::Fill`].
    #[inline]
    pub fn claim_absent(&self, page: u32) -> bool {
        self.take(page, Step::ClaimAbsent)
    }

    /// The contents of a page in flight are in place. False where it was removed meanwhile, or is not in flight.
    #[inline]
    pub fn filled(&self, page: u32) -> bool {
        self.take(page, Step::Filled)
    }

    /// The guest can see the page now. False where it was removed meanwhile, or was not being brought.
    #[inline]
    pub fn settle(&self, page: u32) -> bool {
        self.take(page, Step::Settle)
    }

    /// Gives a claimed page back, nothing having been put in place. False where it was removed meanwhile, or is nobody's.
    #[inline]
    pub fn abandon(&self, page: u32) -> bool {
        self.take(page, Step::Abandon)
    }

    /// The VMM has discarded the page. Returns what it was; a failed page stays failed.
    #[inline]
    pub fn remove(&self, page: u32) -> PageState {
        self.step(page, Step::Remove)
    }

    /// The page cannot be had. Returns what it was; a page that the guest already has stays present.
    #[inline]
    pub fn fail(&self, page: u32) -> PageState {
        self.step(page, Step::Fail)
    }

    /// The first run of absent pages in `from..limit`, empty (at `limit`) where there is none; the first `most` of it, if it is longer.
    ///
    /// A hint: pages may be claimed before the caller does. `limit` beyond the table means its end.
    pub fn absent_run(&self, from: u32, limit: u32, most: u32) -> Range<u32> {
        let limit = limit.min(self.len());
        let from = from.min(limit);
        let rest = &self.states()[from as usize..limit as usize];
        let is_absent = |byte: &AtomicU8| peek(byte) == PageState::Absent;
        let skipped = rest.iter().take_while(|byte| !is_absent(byte)).count();
        let run = rest[skipped..].iter().take(most as usize).take_while(|byte| is_absent(byte)).count();
        let start = from + skipped as u32;
        start..start + run as u32
    }

    /// How many pages are in each state, by the state's number: one walk of the table.
    ///
    /// Each page is counted once, in a state that it had during the walk.
    pub fn count(&self) -> [u64; STATES] {
        let mut counts = [0; STATES];
        for byte in self.states() {
            counts[peek(byte) as usize] += 1;
        }
        counts
    }

    /// How many pages the guest is still owed: absent, in flight or clearing. One walk of the table.
    pub fn lacking(&self) -> u64 {
        let lacking = |byte: &&AtomicU8| peek(byte).is_lacking();
        self.states().iter().filter(lacking).count() as u64
    }

    /// Begins where a pager has left off that is dead, before anybody else takes a step: what it had claimed is nobody's again. Returns
    /// how many pages the guest is still owed. One walk of what was ever written of the table.
    ///
    /// A page in flight may be half written, and has been shown to nobody: it comes again. A page that was being cleared stays removed:
    /// whatever it holds by now is what it reads. What is filled has all its contents, and the guest has perhaps seen them, and written
    /// to them: it is exposed, and never filled again.
    pub fn take_over(&self) -> u64 {
        let mut owed = u64::from(self.len());
        let mut at = 0;
        while let Some((from, to)) = self.written(at) {
            at = from;
            while at < to {
                let (mut state, pages) =
                    self.eight(at).map_or_else(|| (self.state(at), 1), |state| (state, 8));
                if matches!(state, PageState::InFlight | PageState::Clearing) {
                    for page in at..at + pages {
                        self.abandon(page);
                    }
                    state = self.state(at);
                }
                owed -= if state.is_lacking() { 0 } else { u64::from(pages) };
                at += pages;
            }
        }
        owed
    }

    /// The state of the eight pages from `page` on, where all of them are in one and can be looked at together.
    #[cfg_attr(loom, allow(unused_variables, reason = "a table of one's own is looked at page by page"))]
    fn eight(&self, page: u32) -> Option<PageState> {
        match &self.states {
            States::Own(_) => None,
            #[cfg(not(loom))]
            States::Handed(table) => table.eight(page).map(PageState::of),
        }
    }

    /// The pages from `page` on that may be other than absent, up to some that are not.
    fn written(&self, page: u32) -> Option<(u32, u32)> {
        match &self.states {
            States::Own(states) => {
                let end = states.len() as u32;
                (page < end).then_some((page, end))
            }
            #[cfg(not(loom))]
            States::Handed(table) => table.written(page),
        }
    }

    /// Takes a step, and says whether it moved the page.
    #[inline]
    fn take(&self, page: u32, step: Step) -> bool {
        step.from(self.step(page, step)).is_some()
    }

    /// Takes a step, and returns the state that it found: the one it replaced, or the one that it left.
    #[inline]
    fn step(&self, page: u32, step: Step) -> PageState {
        let byte = &self.states()[page as usize];
        // A right guess saves the look before; a wrong one is the look.
        let mut found = step.usual();
        #[cfg(not(loom))]
        let mut tries = 0;
        while let Some(next) = step.from(found) {
            match byte.compare_exchange(found as u8, next as u8, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => found = PageState::of(now),
            }
            #[cfg(not(loom))]
            {
                tries += 1;
                if tries > MOST_TRIES && self.is_handed() {
                    return PageState::Failed;
                }
            }
        }
        found
    }
}

/// A page's state, for walks that rely on nothing that was written before it.
#[inline]
fn peek(byte: &AtomicU8) -> PageState {
    PageState::of(byte.load(Ordering::Relaxed))
}
