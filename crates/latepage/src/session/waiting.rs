//! Faults that could not be served at once. The kernel delivers a fault once: what is not kept here is lost for ever.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// The first pause before an install that the kernel refused for now is tried again. After its event was read, the thread that
/// discards must run before installs succeed; 68 to 84 tight retries were seen.
const FIRST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// A fault that waits, and since when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) page: u32,
    pub(super) since: Instant,
    pub(super) reported: bool,
}

/// A fault that nothing will resolve, by its address in the VMM: it may be outside every region.
#[derive(Clone, Copy, Debug)]
struct Stuck {
    hva: u64,
    since: Instant,
    reported: bool,
}

/// Everything that waits in one session.
pub(super) struct WaitingRoom {
    /// To be tried again on a timer; nobody has claimed their pages.
    parked: VecDeque<Waiting>,
    /// Out with an I/O thread; their pages are in flight.
    tickets: HashMap<u32, Waiting>,
    /// Failed, and the VM could not be killed: they wait until someone does that.
    stuck: Vec<Stuck>,
    /// The parked one that is being tried: should it have to wait again, it has been reported, or not.
    trying: Option<Waiting>,
    pause: Duration,
    due: Option<Instant>,
    /// Whether the kernel's lack of memory has been reported since it last had some.
    pub(super) starved: bool,
}

impl WaitingRoom {
    pub(super) fn new(threads: usize) -> Self {
        Self {
            parked: VecDeque::with_capacity(threads),
            tickets: HashMap::with_capacity(threads),
            stuck: Vec::new(),
            trying: None,
            pause: FIRST_PAUSE,
            due: None,
            starved: false,
        }
    }

    /// Parks a fault. Who waits for the same page is released with it, so that each page is parked once, for its oldest fault.
    pub(super) fn park(&mut self, page: u32, since: Instant) {
        match self.parked.iter_mut().find(|waiting| waiting.page == page) {
            Some(waiting) => waiting.since = waiting.since.min(since),
            None => self.parked.push_back(self.waiting(page, since)),
        }
        if self.due.is_none() {
            self.due = Some(Instant::now() + self.pause);
        }
    }

    /// When parked faults are to be tried again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// How many parked faults to try now: all that wait, once each, if their time has come.
    pub(super) fn begin_round(&mut self, now: Instant) -> usize {
        match self.due {
            Some(due) if due <= now => {
                self.due = None;
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                self.parked.len()
            }
            _ => 0,
        }
    }

    /// Whether what is parked has been tried many times.
    pub(super) fn is_patient(&self) -> bool {
        self.pause == LONGEST_PAUSE
    }

    pub(super) fn next_parked(&mut self) -> Option<Waiting> {
        self.trying = self.parked.pop_front();
        self.trying
    }

    /// After a round in which nothing was parked again, the next trouble starts with a short pause.
    pub(super) fn end_round(&mut self) {
        self.trying = None;
        if self.parked.is_empty() {
            self.pause = FIRST_PAUSE;
        }
    }

    /// Whether the page is to be read: not where it has a ticket already, as a VMM can bring about that scribbles over its page table.
    pub(super) fn ticket(&mut self, page: u32, since: Instant) -> bool {
        let waiting = self.waiting(page, since);
        match self.tickets.entry(page) {
            Entry::Occupied(_) => false,
            Entry::Vacant(ticket) => {
                ticket.insert(waiting);
                true
            }
        }
    }

    /// Takes back the ticket of a page.
    pub(super) fn redeem(&mut self, page: u32) -> Option<Waiting> {
        self.tickets.remove(&page)
    }

    /// Keeps a fault that nothing will resolve. Returns whether it is the first there.
    pub(super) fn stuck(&mut self, hva: u64, since: Instant) -> bool {
        let first = self.stuck.iter().all(|stuck| stuck.hva != hva);
        if first {
            self.stuck.push(Stuck { hva, since, reported: false });
        }
        first
    }

    fn waiting(&self, page: u32, since: Instant) -> Waiting {
        let reported = self.trying.is_some_and(|trying| trying.page == page && trying.reported);
        Waiting { page, since, reported }
    }

    /// The pages that are parked.
    pub(super) fn parked(&self) -> impl Iterator<Item = u32> + '_ {
        self.parked.iter().map(|waiting| waiting.page)
    }

    /// Whether someone waits for a page that failed.
    pub(super) fn has_stuck(&self) -> bool {
        !self.stuck.is_empty()
    }

    /// Every fault that has grown older than `limit` and has not been reported yet: its address and age. `hva` gives a page's.
    pub(super) fn stalled(
        &mut self,
        now: Instant,
        limit: Duration,
        hva: impl Fn(u32) -> u64,
        mut report: impl FnMut(u64, Duration),
    ) {
        let served = self.parked.iter_mut().chain(self.tickets.values_mut());
        let served = served.map(|waiting| (hva(waiting.page), waiting.since, &mut waiting.reported));
        let stuck = self.stuck.iter_mut().map(|stuck| (stuck.hva, stuck.since, &mut stuck.reported));
        for (hva, since, reported) in served.chain(stuck) {
            let age = now.saturating_duration_since(since);
            if age >= limit && !std::mem::replace(reported, true) {
                report(hva, age);
            }
        }
    }
}
