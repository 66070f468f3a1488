//! Fault-around that adapts: which touches follow one another, and how much comes with the next one.
//!
//! A session has a small table of streams. A fault where one of them expects its next page doubles what comes with it, up to
//! [`LONGEST`]; any other fault begins a stream of its own with its page alone. A run never leaves the aligned 2 MiB of the
//! snapshot that its fault is in, so that of each such stretch the first touch is always seen (traces rest on that).
//!
//! Nothing here claims or installs: it only counts pages. What comes of a plan is up to `resolve.rs`.

use std::ops::Range;

use crate::memory::Place;

/// The longest run, in bytes; runs stay within stretches of the snapshot of that size and alignment.
pub(super) const LONGEST: u64 = 2 << 20;
/// What comes before the faulting thread goes on, in bytes: about what a wake-up costs. The rest of a run follows piece by piece,
/// and between two pieces other faults are served.
pub(super) const PIECE: u64 = 64 << 10;
/// How often a piece may be doubled: up to 512 KiB, some 150 µs.
const DOUBLINGS: u32 = 3;
/// Streams that a session remembers: a few a vCPU, since guests run more than one task.
const STREAMS: usize = 16;
/// How many pages that are there already a stream steps over to the next one that is not.
const STEP_OVER: u32 = 64;

/// A stream of faults that follow one another.
#[derive(Clone, Debug, Default)]
struct Stream {
    /// The thread whose faults they are; 0 where the userfaultfd does not tell.
    thread: u32,
    region: usize,
    /// The last run: the faulting page, and all that came or is to come with it.
    run: Range<u32>,
    /// What of it is still to come.
    ahead: Range<u32>,
    /// Whether it goes to lower addresses.
    down: bool,
    /// How many pages were to come with its last fault; 0 where the place in the table is free.
    pages: u32,
    /// Pages that came beside its faults and that nobody is known to have touched yet.
    beside: u32,
    /// When it was last hit, on the table's clock.
    used: u32,
}

/// What is to come with a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// The page and those behind it that come before anyone is woken.
    pub(super) now: Range<u32>,
    /// Pages that came beside earlier faults of its stream, and that it has walked through, as this fault shows.
    pub(super) walked: u32,
    /// Its stream in the table, if it has one.
    pub(super) stream: Option<usize>,
}

impl Plan {
    /// The page and nothing else.
    pub(super) const fn alone(page: u32) -> Self {
        Self { now: page..page + 1, walked: 0, stream: None }
    }
}

/// The streams of a session.
#[derive(Debug, Default)]
pub(super) struct Around {
    streams: [Stream; STREAMS],
    clock: u32,
    /// How many have something ahead.
    pending: u32,
    /// Pieces that came behind one another of the stream `last`, while no other stream was hit.
    undisturbed: u32,
    last: usize,
}

impl Around {
    pub(super) const fn new() -> Self {
        const FREE: Stream = Stream {
            thread: 0,
            region: 0,
            run: 0..0,
            ahead: 0..0,
            down: false,
            pages: 0,
            beside: 0,
            used: 0,
        };
        Self { streams: [FREE; STREAMS], clock: 0, pending: 0, undisturbed: 0, last: 0 }
    }

    /// Plans what comes with a fault on `page`, which is absent and lies at `place`. `stretch` holds the pages of its region that
    /// lie in the same aligned [`LONGEST`] bytes of the snapshot; `fixed` says how many pages come with it where the user has
    /// said that. `is_absent` tells of other pages.
    pub(super) fn plan(
        &mut self,
        page: u32,
        thread: u32,
        place: &Place,
        stretch: Range<u32>,
        fixed: Option<u32>,
        is_absent: impl Fn(u32) -> bool,
    ) -> Plan {
        self.clock = self.clock.wrapping_add(1);
        let found = self.streams.iter().position(|stream| {
            stream.thread == thread && stream.region == place.region && stream.expects(page, &is_absent)
        });
        let at = found.unwrap_or_else(|| self.oldest());
        if found.is_none() || at != self.last {
            (self.undisturbed, self.last) = (0, at);
        }
        let caught_up = self.streams[at].ahead.contains(&page);
        self.set_ahead(at, 0..0);
        let stream = &mut self.streams[at];
        let walked = if found.is_some() {
            stream.down = if caught_up { stream.down } else { page < stream.run.start };
            stream.pages = stream.pages.saturating_mul(2);
            std::mem::take(&mut stream.beside)
        } else {
            *stream = Stream { thread, region: place.region, pages: 1, ..Stream::default() };
            0
        };
        stream.used = self.clock;
        let most = (LONGEST / place.page_size.bytes()) as u32;
        stream.pages = stream.pages.min(most);
        let piece = (PIECE / place.page_size.bytes()).max(1) as u32;
        let now = match fixed {
            Some(pages) => {
                stream.run = page..page + pages;
                stream.run.clone()
            }
            None if stream.down => {
                stream.run = (page + 1).saturating_sub(stream.pages).max(stretch.start)..page + 1;
                page..page + 1
            }
            None => {
                stream.run = page..page.saturating_add(stream.pages).min(stretch.end);
                page..stream.run.end.min(page + piece)
            }
        };
        let ahead = match fixed {
            Some(_) => 0..0,
            None if stream.down => stream.run.start..page,
            None => now.end..stream.run.end,
        };
        self.set_ahead(at, ahead);
        Plan { now, walked, stream: Some(at) }
    }

    /// Of what was to come at once with a stream's fault, only the pages before `end` came: its run ends there. `beside` of them came
    /// beside the fault.
    pub(super) fn came(&mut self, stream: usize, now: &Range<u32>, end: u32, beside: u32) {
        self.streams[stream].beside += beside;
        if end < now.end {
            self.set_ahead(stream, 0..0);
            self.streams[stream].run.end = end;
        }
    }

    /// Whether a stream has something ahead.
    pub(super) fn is_pending(&self) -> bool {
        self.pending > 0
    }

    /// The next piece of the stream that was hit last: which stream, and its pages. As long as no other stream is hit, each piece is
    /// twice as long as the one before, up to eight times [`PIECE`]: whoever walks would only wait for them one by one.
    pub(super) fn next_piece(&mut self, pages_of: impl Fn(u32) -> u32) -> Option<(usize, Range<u32>)> {
        if self.pending == 0 {
            return None;
        }
        let clock = self.clock;
        let pending = self.streams.iter().enumerate().filter(|(_, stream)| !stream.ahead.is_empty());
        let (at, stream) = pending.min_by_key(|(_, stream)| clock.wrapping_sub(stream.used))?;
        let Range { start, end } = stream.ahead;
        let most = pages_of(start).max(1) << self.undisturbed;
        let piece =
            if stream.down { end.saturating_sub(most).max(start)..end } else { start..end.min(start + most) };
        self.undisturbed = (self.undisturbed + 1).min(DOUBLINGS);
        Some((at, piece))
    }

    /// Whether a stream goes to lower addresses.
    pub(super) fn goes_down(&self, stream: usize) -> bool {
        self.streams[stream].down
    }

    /// So many pages of a piece, from its start, came; `whole` says that nothing kept the rest from coming.
    pub(super) fn piece_came(&mut self, stream: usize, piece: &Range<u32>, pages: u32, whole: bool) {
        self.streams[stream].beside += pages;
        let Stream { ahead, down, .. } = &self.streams[stream];
        let rest = match (whole, down) {
            (false, _) => 0..0,
            (true, true) => ahead.start..piece.start,
            (true, false) => piece.end..ahead.end,
        };
        if !whole {
            self.streams[stream].cut(piece, pages);
        }
        self.set_ahead(stream, rest);
    }

    /// A fault was seen on a page that is there or on its way. Whether it is one that came beside another.
    pub(super) fn touched(&mut self, page: u32) -> bool {
        let brought = |stream: &&mut Stream| {
            stream.beside > 0 && stream.run.contains(&page) && !stream.ahead.contains(&page)
        };
        let found = self.streams.iter_mut().find(brought);
        found.map(|stream| stream.beside -= 1).is_some()
    }

    fn set_ahead(&mut self, at: usize, ahead: Range<u32>) {
        let before = std::mem::replace(&mut self.streams[at].ahead, ahead);
        self.pending -= u32::from(!before.is_empty());
        self.pending += u32::from(!self.streams[at].ahead.is_empty());
    }

    /// The place for a new stream. One that has proved itself outlives many single faults.
    fn oldest(&self) -> usize {
        let mut oldest = (0, 0);
        for (at, stream) in self.streams.iter().enumerate() {
            if stream.pages == 0 {
                return at;
            }
            let age = self.clock.wrapping_sub(stream.used) >> stream.pages.ilog2().min(3);
            if age >= oldest.1 {
                oldest = (at, age);
            }
        }
        oldest.0
    }
}

impl Stream {
    /// Whether a fault on this page is the one that it waits for: the first absent page behind its run, or, where the guest is
    /// faster than we are, one that was to come anyway. A stream of one page may still turn out to go down.
    fn expects(&self, page: u32, is_absent: &impl Fn(u32) -> bool) -> bool {
        if self.pages == 0 {
            return false;
        }
        if self.ahead.contains(&page) {
            return true;
        }
        let up = !self.down && (self.run.end..self.run.end.saturating_add(STEP_OVER)).contains(&page);
        if up {
            return !(self.run.end..page).any(is_absent);
        }
        let may_go_down = self.down || self.run.end - self.run.start == 1;
        may_go_down
            && (self.run.start.saturating_sub(STEP_OVER)..self.run.start).contains(&page)
            && !(page + 1..self.run.start).any(is_absent)
    }

    /// The rest of its run does not come: only so many pages of this piece, from its start.
    fn cut(&mut self, piece: &Range<u32>, pages: u32) {
        if self.down {
            self.run.start = piece.end;
        } else {
            self.run.end = piece.start + pages;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Layout, PageSize, Region};

    /// A guest of pages of 4 KiB whose table is a set, served by a source that has everything at hand.
    struct Guest {
        layout: Layout,
        around: Around,
        absent: Vec<bool>,
    }

    impl Guest {
        fn new(pages: u32) -> Self {
            let size = u64::from(pages) * 4096;
            let region =
                Region { gpa: None, hva: 0x7000_0000_0000, size, offset: 0, page_size: PageSize::Small };
            let layout = Layout::new(vec![region]).unwrap();
            Self { layout, around: Around::new(), absent: vec![true; pages as usize] }
        }

        fn bring(&mut self, pages: Range<u32>) {
            pages.for_each(|page| self.absent[page as usize] = false);
        }

        /// A fault: what came with it at once. `None` where the page was there.
        fn fault(&mut self, page: u32, thread: u32) -> Option<(Range<u32>, u32)> {
            if !self.absent[page as usize] {
                return None;
            }
            let stretch = page / 512 * 512..(page / 512 * 512 + 512).min(self.layout.pages());
            let place = self.layout.place(page);
            let absent = &self.absent;
            let plan = self.around.plan(page, thread, &place, stretch, None, |page| absent[page as usize]);
            let end = plan.now.clone().find(|page| !self.absent[*page as usize]).unwrap_or(plan.now.end);
            self.around.came(plan.stream.unwrap(), &plan.now, end, end - page - 1);
            self.bring(page..end);
            Some((page..end, plan.walked))
        }

        /// All that is to come behind the fault: in pieces of 16 pages.
        fn ahead(&mut self) -> Vec<Range<u32>> {
            let mut pieces = Vec::new();
            while let Some((stream, piece)) = self.around.next_piece(|_| 16) {
                let down = self.around.goes_down(stream);
                let absent = |page: &u32| self.absent[*page as usize];
                let came = match down {
                    true => piece.clone().rev().take_while(absent).count(),
                    false => piece.clone().take_while(absent).count(),
                } as u32;
                let run = if down { piece.end - came..piece.end } else { piece.start..piece.start + came };
                self.around.piece_came(stream, &piece, came, run == piece);
                self.bring(run.clone());
                pieces.push(run);
            }
            pieces
        }
    }

    #[test]
    fn scattered_touches_bring_their_page_alone() {
        let mut guest = Guest::new(4096);
        for touch in 0..1000 {
            let page = touch * 2677 % 4096;
            if let Some((came, _)) = guest.fault(page, 0) {
                // A neighbour may have been touched by chance: twice as much is the first step.
                assert!(came.end - came.start <= 2, "{came:?} for {page}");
            }
            guest.ahead();
        }
    }

    #[test]
    fn touches_that_follow_one_another_bring_twice_as_much_each_time_up_to_two_mebibytes() {
        let mut guest = Guest::new(4096);
        let (mut page, mut came) = (0, Vec::new());
        while page < 4096 {
            if let Some((now, _)) = guest.fault(page, 0) {
                let ahead: u32 = guest.ahead().iter().map(|piece| piece.end - piece.start).sum();
                assert!(now.end - now.start <= 16, "no more than a piece before the guest goes on");
                came.push(now.end - now.start + ahead);
            }
            page += 1;
        }
        // 1 + 2 + ... + 128 is 255: the next run ends with its stretch of 2 MiB, after which every run is one.
        assert_eq!(came, [1, 2, 4, 8, 16, 32, 64, 128, 256, 1, 512, 512, 512, 512, 512, 512, 512]);
    }

    #[test]
    fn a_stream_may_go_down() {
        let mut guest = Guest::new(1024);
        let mut faults = 0;
        for page in (0..1024).rev() {
            if guest.fault(page, 0).is_some() {
                faults += 1;
            }
            guest.ahead();
        }
        assert!(faults <= 14, "{faults} faults for two stretches");
    }

    #[test]
    fn streams_of_threads_do_not_disturb_one_another() {
        let mut guest = Guest::new(8 * 512);
        let mut faults = 0;
        for step in 0..512 {
            for thread in 1..=8 {
                faults += u32::from(guest.fault((thread - 1) * 512 + step, thread).is_some());
                guest.ahead();
            }
        }
        assert_eq!(faults, 8 * 10);
    }

    #[test]
    fn interleaved_streams_of_a_userfaultfd_that_tells_no_threads_are_told_apart_by_their_addresses() {
        let mut guest = Guest::new(8 * 512);
        let mut faults = 0;
        for step in 0..512 {
            for stream in 0..8 {
                faults += u32::from(guest.fault(stream * 512 + step, 0).is_some());
                guest.ahead();
            }
        }
        assert_eq!(faults, 8 * 10);
    }

    #[test]
    fn a_run_ends_before_what_is_there_and_goes_on_behind_it() {
        let mut guest = Guest::new(512);
        guest.bring(20..24);
        for page in 0..512 {
            if let Some((now, _)) = guest.fault(page, 0) {
                assert!(!now.contains(&20) && guest.ahead().iter().all(|piece| !piece.contains(&20)));
            }
        }
        assert!(guest.absent.iter().all(|absent| !absent));
    }

    #[test]
    fn the_fault_behind_a_run_shows_that_it_was_walked_through() {
        let mut guest = Guest::new(512);
        assert_eq!(guest.fault(0, 0).unwrap().1, 0);
        assert_eq!(guest.fault(1, 0).unwrap(), (1..3, 0));
        assert_eq!(guest.fault(3, 0).unwrap(), (3..7, 1), "page 2 came beside page 1");
        assert_eq!(guest.fault(7, 0).unwrap(), (7..15, 3));
        assert!(guest.around.touched(9), "someone is seen to touch it after all");
        assert!(!guest.around.touched(200));
        assert_eq!(guest.fault(15, 0).unwrap().1, 6, "of seven, one was counted");
    }

    #[test]
    fn a_guest_that_is_faster_than_we_are_is_followed() {
        let mut guest = Guest::new(512);
        let mut page = 0;
        for _ in 0..6 {
            page = guest.fault(page, 0).unwrap().0.end;
        }
        // 16 pages of 32 have come, and it is there already.
        assert!(guest.around.is_pending());
        let (came, _) = guest.fault(page, 0).unwrap();
        assert_eq!(came, page..page + 16);
        let ahead: u32 = guest.ahead().iter().map(|piece| piece.end - piece.start).sum();
        assert_eq!(ahead, 64 - 16, "twice as much as the run that was overtaken");
    }

    #[test]
    fn a_proven_stream_outlives_many_single_touches() {
        let mut guest = Guest::new(64 * 512);
        let mut page = 0;
        for _ in 0..7 {
            page = guest.fault(page, 0).unwrap().0.end;
            guest.ahead().iter().for_each(|piece| page = piece.end);
        }
        for single in 0..STREAMS as u32 * 4 {
            guest.fault(1024 + single * 300, 0);
        }
        let (came, _) = guest.fault(page, 0).unwrap();
        assert_eq!(came, page..page + 16, "it goes on with a whole piece");
    }
}
