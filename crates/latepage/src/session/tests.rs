//! The gate, the waiting room, and a session over a delivery and an install that do as they are told: for what the kernel does
//! too seldom, or only for a moment.
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, most of them short")]

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::around::Around;
use super::batch::Fresh;
use super::deliveries::Deliveries;
use super::gate::Gate;
use super::waiting::WaitingRoom;
use super::{
    Action, Core, End, FaultAround, Host, LetGo, OnMissing, Peer, Policy, Population, Report, Scratch,
    Session,
};
use crate::attachment::{Backing, Form, Hello};
use crate::delivery::channel::{Channel, ChannelDelivery, Completion, Request, Waited, attach};
use crate::delivery::{Batch, Delivery, DeliveryError, Fault, FaultFlags};
use crate::install::{Install, Outcome, Stop};
use crate::memory::{Layout, PageSize, PageState, Region, Shards};
use crate::source::{Answer, AtHand, Source, SourceError};
use crate::sys::mapping::{Mapping, Window};
use crate::sys::uffd::{Features, Userfaultfd};

/// One that comes is served by whoever holds the gate, or by himself: in every interleaving of many.
#[test]
fn a_mark_left_while_the_gate_is_held_is_always_served() {
    const ROUNDS: u64 = 20_000;
    let gate = Arc::new(Gate::new(0));
    let asked = Arc::new(AtomicU64::new(0));
    // As `Session::serve` does: all that was asked for by now is served.
    let serve = |gate: &Gate<u64>, asked: &AtomicU64| {
        let Some(mut guard) = gate.try_enter() else { return };
        loop {
            *guard = asked.load(Ordering::SeqCst);
            match gate.leave(guard) {
                Some(again) => guard = again,
                None => return,
            }
            gate.take_wanted();
        }
    };
    for _ in 0..20 {
        let worker = {
            let (gate, asked) = (Arc::clone(&gate), Arc::clone(&asked));
            std::thread::spawn(move || {
                for _ in 0..ROUNDS / 20 {
                    asked.fetch_add(1, Ordering::SeqCst);
                    serve(&gate, &asked);
                }
            })
        };
        // As `Session::inside` and `Session::briefly` do.
        let holders = [true, false].map(|serves| {
            let (gate, asked) = (Arc::clone(&gate), Arc::clone(&asked));
            std::thread::spawn(move || {
                for _ in 0..ROUNDS / 20 {
                    let guard = gate.enter();
                    if !serves {
                        if gate.leave_marked(guard) {
                            serve(&gate, &asked);
                        }
                        continue;
                    }
                    let mut guard = guard;
                    if gate.take_wanted() {
                        *guard = asked.load(Ordering::SeqCst);
                    }
                    while let Some(mut again) = gate.leave(guard) {
                        gate.take_wanted();
                        *again = asked.load(Ordering::SeqCst);
                        guard = again;
                    }
                }
            })
        });
        worker.join().unwrap();
        for holder in holders {
            holder.join().unwrap();
        }
        assert_eq!(*gate.enter(), asked.load(Ordering::SeqCst), "one that had come was served by nobody");
    }
}

#[test]
fn a_gate_whose_holder_panicked_still_opens() {
    let gate = Arc::new(Gate::new(1));
    let holder = {
        let gate = Arc::clone(&gate);
        std::thread::spawn(move || {
            let _guard = gate.enter();
            panic!("on purpose");
        })
    };
    assert!(holder.join().is_err());
    assert_eq!(gate.try_enter().map(|guard| *guard), Some(1));
    assert_eq!(*gate.enter(), 1);
}

#[test]
fn parked_faults_are_tried_once_a_round_with_growing_pauses() {
    let now = Instant::now();
    let mut room = WaitingRoom::new(4);
    assert_eq!((room.due(), room.begin_round(now)), (None, 0));
    room.park(1, now);
    room.park(2, now);
    room.park(1, now);
    let due = room.due().unwrap();
    assert_eq!(room.begin_round(now - Duration::from_secs(1)), 0, "not yet");
    assert_eq!(room.begin_round(due), 2, "each page once");
    let mut pauses = Vec::new();
    for _ in 0..12 {
        let page = room.next_parked().unwrap().page;
        let before = Instant::now();
        room.park(page, now);
        pauses.push(room.due().map(|due| due.saturating_duration_since(before)));
        room.end_round();
        room.begin_round(now + Duration::from_secs(3600));
    }
    let pauses: Vec<_> = pauses.into_iter().flatten().collect();
    assert!(pauses.windows(2).all(|pair| pair[0] <= pair[1] + Duration::from_micros(40)), "{pauses:?}");
    assert!(room.is_patient());
    while room.next_parked().is_some() {}
    room.end_round();
    assert!(!room.is_patient());
}

#[test]
fn a_fault_that_is_tried_again_and_again_is_told_once_too() {
    let now = Instant::now();
    let mut room = WaitingRoom::new(4);
    room.park(1, now);
    let mut told = 0;
    for second in 1..10 {
        let then = now + Duration::from_secs(second);
        room.stalled(then, Duration::from_secs(3), u64::from, |_, _| told += 1);
        assert_eq!(room.begin_round(then), 1);
        let waiting = room.next_parked().unwrap();
        room.park(waiting.page, waiting.since);
        room.end_round();
    }
    assert_eq!(told, 1);
    // A later fault on that page is another one.
    room.begin_round(now + Duration::from_secs(20));
    room.next_parked().unwrap();
    room.end_round();
    room.park(1, now + Duration::from_secs(20));
    room.stalled(now + Duration::from_secs(30), Duration::from_secs(3), u64::from, |_, _| told += 1);
    assert_eq!(told, 2);
}

#[test]
fn a_fault_that_waits_too_long_is_told_once_wherever_it_waits() {
    let now = Instant::now();
    let limit = Duration::from_secs(5);
    let mut room = WaitingRoom::new(4);
    room.park(1, now);
    room.ticket(2, now);
    assert!(room.stuck(3, now));
    assert!(!room.stuck(3, now + limit), "it waits there already");
    room.park(4, now + limit);
    let mut told = Vec::new();
    for after in [4, 5, 6] {
        room.stalled(now + Duration::from_secs(after), limit, u64::from, |hva, age| {
            told.push((hva, age.as_secs()))
        });
    }
    assert_eq!(told, [(1, 5), (2, 5), (3, 5)]);
    assert_eq!(room.redeem(2).map(|waiting| waiting.page), Some(2));
    assert!(room.redeem(2).is_none());
}

/// What the two fakes and the host were asked, in order.
type Log = Arc<Mutex<Vec<String>>>;

/// What the delivery has yet to bring: removed pages, and faults.
type Batches = Arc<Mutex<VecDeque<(Vec<Range<u32>>, Vec<u32>)>>>;

struct Told {
    batches: Batches,
    log: Log,
    descriptor: std::fs::File,
}

impl Delivery for Told {
    fn take(&mut self, _: &Layout, batch: &mut Batch) -> Result<(), DeliveryError> {
        if let Some((removed, pages)) = self.batches.lock().unwrap().pop_front() {
            batch.removed = removed;
            let fault = |page| Fault { page, flags: FaultFlags::empty(), thread: 0 };
            batch.faults = pages.into_iter().map(fault).collect();
        }
        Ok(())
    }

    fn release(&mut self, _: &Layout, pages: Range<u32>) {
        self.log.lock().unwrap().push(format!("release {pages:?}"));
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Installs everything, unless it was told to stop.
struct Obedient {
    stops: Arc<Mutex<VecDeque<Stop>>>,
    log: Log,
}

impl Obedient {
    fn answer(&self, what: &str, pages: Range<u32>) -> Outcome {
        self.log.lock().unwrap().push(format!("{what} {pages:?}"));
        match self.stops.lock().unwrap().pop_front() {
            Some(stop) => Outcome { pages: 0, stopped: Some(stop) },
            None => Outcome { pages: pages.end - pages.start, stopped: None },
        }
    }
}

impl Install for Obedient {
    fn fill(&self, _: &Layout, first: u32, contents: &[u8]) -> Outcome {
        self.answer("fill", first..first + (contents.len() / 4096) as u32)
    }

    fn fill_window(&self, _: &Layout, first: u32, contents: Window<'_>) -> Outcome {
        self.answer("fill from a window", first..first + (contents.len() / 4096) as u32)
    }

    fn fill_exposes(&self) -> bool {
        true
    }

    fn zero(&self, _: &Layout, pages: Range<u32>) -> Outcome {
        self.answer("zero", pages)
    }

    fn expose(&self, _: &Layout, pages: Range<u32>) -> Outcome {
        self.answer("expose", pages)
    }

    fn unprotect(&self, _: &Layout, page: u32) -> Outcome {
        self.answer("unprotect", page..page + 1)
    }

    fn poison(&self, _: &Layout, pages: Range<u32>) -> Outcome {
        self.answer("poison", pages)
    }

    fn detach(&self, _: &Layout, _: Range<u32>) -> Result<(), Errno> {
        self.log.lock().unwrap().push("detach".to_owned());
        Ok(())
    }

    fn has_memory(&self) -> bool {
        true
    }

    fn is_changing(&self) -> bool {
        self.stops.lock().unwrap().pop_front() == Some(Stop::Busy)
    }
}

/// Ones, but for page 6, which is broken.
struct Ones;

impl Source for Ones {
    fn describe(&self) -> String {
        "ones".to_owned()
    }

    fn size(&self) -> u64 {
        8 * 4096
    }

    fn ask<'a>(
        &'a self,
        offset: u64,
        _: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        if offset == 6 * 4096 {
            return Err(SourceError::Read { path: "ones".into(), offset, errno: Errno::IO });
        }
        scratch[..unit].fill(1);
        Ok(Answer::Bytes(&scratch[..unit]))
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.ask(offset, length, unit, scratch)
    }
}

/// 128 pages that are all at hand, until nobody can vouch for them any more.
struct Shown {
    view: Mapping,
    vouches: AtomicU64,
}

impl Shown {
    fn new(vouches: u64) -> Arc<Self> {
        let file = crate::sys::memfd::create("shown", 0).unwrap();
        rustix::fs::ftruncate(&file, 128 * 4096).unwrap();
        let view = Mapping::read_only(file.as_fd(), 128 * 4096).unwrap();
        Arc::new(Self { view, vouches: AtomicU64::new(vouches) })
    }
}

impl Source for Shown {
    fn describe(&self) -> String {
        "shown".to_owned()
    }

    fn size(&self) -> u64 {
        128 * 4096
    }

    fn ask<'a>(&'a self, _: u64, _: usize, _: usize, _: &'a mut [u8]) -> Result<Answer<'a>, SourceError> {
        Ok(Answer::Later)
    }

    fn at_hand(&self, offset: u64, length: usize, _: usize) -> Option<AtHand<'_>> {
        Some(AtHand::Contents(self.view.window(offset as usize, length)))
    }

    fn vouch(&self) -> Result<(), SourceError> {
        let left = self.vouches.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        left.map(drop).map_err(|_| SourceError::OpenedForWriting { path: "shown".into() })
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.ask(offset, length, unit, scratch)
    }
}

struct Ear(Log);

impl Host for Ear {
    fn report(&self, _: &Session, report: Report) {
        let line = match report {
            Report::Full => "full".to_owned(),
            Report::Failed { page, action, .. } => format!("failed {page:?} {action}"),
            Report::NoMemory { .. } => "no memory".to_owned(),
            Report::Over(end) => format!("over {end:?}"),
            other => format!("{other:?}"),
        };
        self.0.lock().unwrap().push(line);
    }

    fn read_later(&self, _: &Arc<Session>, page: u32) {
        self.0.lock().unwrap().push(format!("later {page}"));
    }

    fn nudge(&self, _: &Session, _: usize) {}
}

struct Staged {
    session: Arc<Session>,
    batches: Batches,
    stops: Arc<Mutex<VecDeque<Stop>>>,
    log: Log,
    scratch: Scratch,
}

impl Staged {
    /// A session of eight pages, part of this very process. `None` where there is no userfaultfd.
    fn new(on_missing: OnMissing) -> Option<Self> {
        let policy = Policy { on_missing, fault_around: FaultAround::NONE, ..Policy::default() };
        Self::of(Arc::new(Ones), policy)
    }

    /// The same, of as many pages as the source has, and with this policy.
    fn of(source: Arc<dyn Source>, policy: Policy) -> Option<Self> {
        let userfaultfd = match Userfaultfd::create(Features::empty()) {
            Ok(made) => made,
            Err(error) => {
                eprintln!("skipped: {error}");
                return None;
            }
        };
        let region =
            Region { gpa: None, hva: 1 << 30, size: source.size(), offset: 0, page_size: PageSize::Small };
        let layout = Layout::new(vec![region]).unwrap();
        let hello = Hello {
            form: Form::Latepage,
            name: Some("staged".to_owned()),
            vcpus: 1,
            backing: Backing::Anonymous,
            shards: Shards::whole(&layout),
            layout,
            userfaultfds: vec![userfaultfd],
            memory: None,
            notify: None,
        };
        let log = Log::default();
        let peer = Peer { pid: Some(std::process::id()), process: None, socket: None };
        let host = Arc::new(Ear(Arc::clone(&log)));
        let session = Session::new(1, hello, peer, source, policy, host).unwrap();
        let (batches, stops) = (Arc::default(), Arc::default());
        let delivery = Told {
            batches: Arc::clone(&batches),
            log: Arc::clone(&log),
            descriptor: std::fs::File::open("/dev/null").unwrap(),
        };
        let install = Obedient { stops: Arc::clone(&stops), log: Arc::clone(&log) };
        *session.shards[0].gate.enter() = Some(Core {
            pages: session.divided.pages(0),
            deliveries: Deliveries::new(vec![Box::new(delivery)]),
            install: Box::new(install),
            waiting: WaitingRoom::new(8),
            around: Around::new(),
            fresh: Fresh::new(8),
            served: Instant::now(),
            forked: Vec::new(),
        });
        Some(Self { session, batches, stops, log, scratch: Scratch::new() })
    }

    /// Serves one batch, and returns what was done.
    fn serve(&mut self, removed: &[Range<u32>], faults: &[u32], stops: &[Stop]) -> Vec<String> {
        self.batches.lock().unwrap().push_back((removed.to_vec(), faults.to_vec()));
        self.stops.lock().unwrap().extend(stops);
        self.session.serve(0, &mut self.scratch);
        self.told()
    }

    fn told(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    /// Serves until what is parked has been tried again.
    fn retry(&mut self) -> Vec<String> {
        loop {
            self.session.serve(0, &mut self.scratch);
            let told = self.told();
            if !told.is_empty() {
                return told;
            }
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_page_removed_in_the_same_breath_as_its_fault_comes_as_zero() {
    let Some(mut staged) = Staged::new(OnMissing::Kill) else { return };
    assert_eq!(staged.serve(&[2..4], &[1, 2, 3], &[]), ["fill 1..2", "zero 2..3", "zero 3..4"]);
    assert_eq!(staged.session.owed(), 5);
}

#[test]
fn a_refused_install_is_parked_and_tried_again_until_it_comes() {
    let Some(mut staged) = Staged::new(OnMissing::Kill) else { return };
    assert_eq!(staged.serve(&[], &[1], &[Stop::Busy]), ["fill 1..2"]);
    assert_eq!(staged.session.pages().state(1), PageState::Absent);
    staged.stops.lock().unwrap().push_back(Stop::Busy);
    assert_eq!(staged.retry(), ["fill 1..2"]);
    // Meanwhile it was removed: it is not the snapshot's any more.
    let told = staged.serve(&[0..8], &[], &[]);
    let told = if told == ["full"] { staged.retry() } else { told };
    assert!(told.contains(&"zero 1..2".to_owned()), "{told:?}");
    assert_eq!(staged.session.pages().state(1), PageState::Present);
}

#[test]
fn want_of_memory_is_told_once_until_there_is_some() {
    let Some(mut staged) = Staged::new(OnMissing::Kill) else { return };
    assert_eq!(staged.serve(&[], &[1], &[Stop::NoMemory]), ["fill 1..2", "no memory"]);
    staged.stops.lock().unwrap().push_back(Stop::NoMemory);
    assert_eq!(staged.retry(), ["fill 1..2"]);
    assert_eq!(staged.retry(), ["fill 1..2"]);
    assert_eq!(staged.serve(&[], &[2], &[Stop::NoMemory]), ["fill 2..3", "no memory"]);
}

#[test]
fn a_fault_whose_range_is_gone_is_dropped_and_its_waiter_looks_again() {
    let Some(mut staged) = Staged::new(OnMissing::Kill) else { return };
    assert_eq!(staged.serve(&[], &[1], &[Stop::Unmapped]), ["fill 1..2", "release 1..2"]);
    assert_eq!(staged.serve(&[], &[], &[]), [""; 0]);
}

#[test]
fn a_page_that_someone_else_installed_is_released() {
    let Some(mut staged) = Staged::new(OnMissing::Kill) else { return };
    assert_eq!(staged.serve(&[], &[1], &[Stop::AlreadyThere]), ["fill 1..2", "release 1..2"]);
    assert_eq!(staged.session.pages().state(1), PageState::Present);
    // A fault on it later is normal: it is exposed again.
    assert_eq!(staged.serve(&[], &[1], &[Stop::AlreadyThere]), ["expose 1..2", "release 1..2"]);
    assert_eq!(staged.session.owed(), 7);
}

#[test]
fn a_process_that_is_gone_ends_its_session() {
    let Some(mut staged) = Staged::new(OnMissing::Kill) else { return };
    assert_eq!(staged.serve(&[], &[1, 2], &[Stop::Gone]), ["fill 1..2", "over Gone", "fill 2..3"]);
    assert_eq!(staged.session.end(), Some(End::Gone));
    assert_eq!(staged.serve(&[], &[3], &[]), [""; 0]);
}

#[test]
fn a_poisoning_that_the_kernel_refuses_for_now_is_tried_again() {
    let Some(mut staged) = Staged::new(OnMissing::Poison) else { return };
    // The VM is part of this process, so that a kill would show as held.
    assert_eq!(staged.serve(&[], &[6], &[Stop::Busy]), ["poison 6..7"]);
    assert_eq!(staged.retry(), ["poison 6..7", "failed Some(6) poisoned"]);
    assert_eq!(staged.session.pages().state(6), PageState::Failed);
}

#[test]
fn a_poisoning_that_the_kernel_cannot_do_is_a_kill() {
    let Some(mut staged) = Staged::new(OnMissing::Poison) else { return };
    let told = staged.serve(&[], &[6], &[Stop::Failed(Errno::INVAL)]);
    assert_eq!(told[0], "poison 6..7");
    assert!(told[1].starts_with("failed Some(6) held"), "{told:?}");
    assert_eq!(staged.session.kill(), Action::HeldSelf);
}

#[test]
fn a_vm_is_let_go_only_when_nothing_is_owed_and_no_discard_is_under_way() {
    let Some(mut staged) = Staged::new(OnMissing::Kill) else { return };
    let session = Arc::clone(&staged.session);
    assert_eq!(session.detach(&mut staged.scratch), LetGo::Kept);
    staged.serve(&[6..7], &[0, 1, 2, 3, 4, 5, 7], &[]);
    staged.stops.lock().unwrap().push_back(Stop::Busy);
    assert_eq!(session.detach(&mut staged.scratch), LetGo::NotYet);
    assert_eq!(session.end(), None);
    staged.told();
    assert_eq!(session.detach(&mut staged.scratch), LetGo::Done);
    assert_eq!(session.end(), Some(End::Detached));
    // UNREGISTER leaves some asleep who fault at that moment: everyone is woken after it.
    let told = staged.told();
    assert_eq!(told[..2], ["detach", "release 0..8"], "{told:?}");
}

#[test]
fn a_vm_is_not_let_go_while_a_failed_page_has_yet_to_be_poisoned() {
    let Some(mut staged) = Staged::new(OnMissing::Poison) else { return };
    staged.serve(&[], &[0, 1, 2, 3, 4, 5, 7], &[]);
    staged.serve(&[], &[6], &[Stop::Busy]);
    assert_eq!(staged.session.owed(), 0);
    let session = Arc::clone(&staged.session);
    assert_eq!(session.detach(&mut staged.scratch), LetGo::NotYet);
    assert_eq!(session.end(), None);
    // Once it is poisoned, there is nothing to keep.
    if !staged.told().contains(&"failed Some(6) poisoned".to_owned()) {
        while !staged.retry().contains(&"failed Some(6) poisoned".to_owned()) {}
    }
    assert_eq!(session.detach(&mut staged.scratch), LetGo::Done);
}

#[test]
fn a_vm_that_waits_for_a_failed_page_is_never_let_go() {
    let Some(mut staged) = Staged::new(OnMissing::Kill) else { return };
    staged.serve(&[], &[0, 1, 2, 3, 4, 5, 6, 7], &[]);
    assert_eq!(staged.session.owed(), 0);
    let session = Arc::clone(&staged.session);
    assert_eq!(session.detach(&mut staged.scratch), LetGo::Kept);
    assert!(!staged.told().contains(&"detach".to_owned()));
}

#[test]
fn each_wait_that_is_over_counts_once_by_what_it_met_and_what_came_of_it() {
    let Some(mut staged) = Staged::new(OnMissing::Poison) else { return };
    // From the source; removed in the same breath; there already, and asked for again; gone; broken and poisoned.
    staged.serve(&[2..3], &[1, 2], &[]);
    staged.serve(&[], &[3], &[Stop::AlreadyThere]);
    staged.serve(&[], &[3], &[Stop::AlreadyThere]);
    staged.serve(&[], &[4], &[Stop::Unmapped]);
    staged.serve(&[], &[6], &[]);
    // Refused at first.
    staged.serve(&[], &[5], &[Stop::Busy]);
    staged.retry();
    let snapshot = staged.session.stats().snapshot();
    let counted: Vec<_> = snapshot
        .by_class
        .iter()
        .map(|(class, result, cell)| (class.name(), result.name(), cell.buckets.iter().sum::<u64>()))
        .filter(|(_, _, count)| *count > 0)
        .collect();
    let expected = [
        ("source", "installed", 1),
        ("source", "deferred", 1),
        ("zero", "installed", 1),
        ("resident", "present", 2),
        ("unknown", "discarded", 1),
        ("unknown", "failed", 1),
    ];
    assert_eq!(counted, expected);
    // Nobody was released from the page that failed.
    assert_eq!(snapshot.latency.count, 6);
}

#[test]
fn a_page_that_comes_releases_who_waits_at_any_delivery() {
    /// One at which nobody posts: what it is told.
    struct Beside(Log, std::fs::File);

    impl Delivery for Beside {
        fn take(&mut self, _: &Layout, _: &mut Batch) -> Result<(), DeliveryError> {
            Ok(())
        }

        fn release(&mut self, _: &Layout, pages: Range<u32>) {
            self.0.lock().unwrap().push(format!("beside: release {pages:?}"));
        }

        fn installed(&mut self, _: &Layout, pages: Range<u32>) {
            self.0.lock().unwrap().push(format!("beside: installed {pages:?}"));
        }

        fn failed(&mut self, _: &Layout, pages: Range<u32>) {
            self.0.lock().unwrap().push(format!("beside: failed {pages:?}"));
        }

        fn descriptor(&self) -> BorrowedFd<'_> {
            self.1.as_fd()
        }
    }

    let Some(mut staged) = Staged::new(OnMissing::Poison) else { return };
    let beside = || Beside(Arc::clone(&staged.log), std::fs::File::open("/dev/null").unwrap());
    let first = Told {
        batches: Arc::clone(&staged.batches),
        log: Arc::clone(&staged.log),
        descriptor: std::fs::File::open("/dev/null").unwrap(),
    };
    let both = Deliveries::new(vec![Box::new(beside()), Box::new(first)]);
    staged.session.shards[0].gate.enter().as_mut().unwrap().deliveries = both;
    assert_eq!(staged.serve(&[], &[1], &[]), ["fill 1..2", "beside: installed 1..2"]);
    assert_eq!(staged.serve(&[2..3], &[2], &[]), ["zero 2..3", "beside: installed 2..3"]);
    let there = ["fill 3..4", "beside: release 3..4", "release 3..4"];
    assert_eq!(staged.serve(&[], &[3], &[Stop::AlreadyThere]), there);
    assert_eq!(staged.serve(&[], &[1], &[]), ["expose 1..2", "beside: installed 1..2"]);
    let told = staged.serve(&[], &[6], &[]);
    assert_eq!(told, ["poison 6..7", "beside: failed 6..7", "failed Some(6) poisoned"]);
    let mut descriptors = 0;
    assert!(staged.session.with_descriptors(0, |_| {
        descriptors += 1;
        true
    }));
    assert_eq!(descriptors, 2);
}

/// Zeros, so many pages of them.
struct Zeros(u32);

impl Source for Zeros {
    fn describe(&self) -> String {
        "zeros".to_owned()
    }

    fn size(&self) -> u64 {
        u64::from(self.0) * 4096
    }

    fn ask<'a>(
        &'a self,
        _: u64,
        length: usize,
        _: usize,
        _: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        Ok(Answer::Zero(length as u64))
    }

    fn wait<'a>(
        &'a self,
        offset: u64,
        length: usize,
        unit: usize,
        scratch: &'a mut [u8],
    ) -> Result<Answer<'a>, SourceError> {
        self.ask(offset, length, unit, scratch)
    }
}

#[test]
fn a_vm_that_floods_its_channel_with_removals_leaves_others_their_turn() {
    const SLOTS: u32 = 64;
    const PAGES: u32 = 4 * Batch::REMOVALS;
    let Some(mut hostile) = Staged::of(Arc::new(Zeros(PAGES)), Policy::default()) else { return };
    let Some(mut other) = Staged::new(OnMissing::Kill) else { return };
    let channel = Channel::new(SLOTS, PAGES).unwrap();
    let (memory, bell) = channel.descriptors();
    let reader = attach(memory, bell.try_clone_to_owned().unwrap(), PAGES, SLOTS).unwrap();
    let deliveries = Deliveries::new(vec![Box::new(ChannelDelivery::new(reader))]);
    hostile.session.shards[0].gate.enter().as_mut().unwrap().deliveries = deliveries;
    // The last slot's thread wants a page; each of the others takes all memory away.
    let mut seats: Vec<_> = (0..SLOTS).map(|slot| channel.seat(slot).unwrap()).collect();
    let (last, removing) = seats.split_last_mut().unwrap();
    removing.iter_mut().for_each(|seat| seat.post(&Request::Removed(0..PAGES)).unwrap());
    last.post(&Request::Fault { page: PAGES - 1, write: false, thread: 0 }).unwrap();
    let mut turn = || hostile.session.serve(0, &mut hostile.scratch);
    assert!(turn().more);
    let removed = |pages: Range<u32>| {
        pages.filter(|page| hostile.session.pages().state(*page) == PageState::Removed).count() as u32
    };
    assert_eq!(removed(0..PAGES), Batch::REMOVALS, "a turn is so many pages, whoever names more");
    assert_eq!(other.serve(&[], &[1], &[]), ["fill 1..2"], "it has its turn now");
    let no_time = Some(Duration::ZERO);
    assert!(
        matches!(last.wait(0, no_time), Waited::Over(Completion::Done(_))),
        "nor is its own fault behind"
    );
    assert!(removing.iter_mut().all(|seat| seat.wait(0, no_time) == Waited::TimedOut));
    let mut turns = 1;
    while turn().more {
        turns += 1;
    }
    assert_eq!(turns, (SLOTS - 1) * PAGES / Batch::REMOVALS);
    let done = Waited::Over(Completion::Done(0..PAGES));
    assert!(removing.iter_mut().all(|seat| seat.wait(0, no_time) == done));
    assert_eq!(removed(0..PAGES), PAGES);
}

/// Touches pages one after another until a run is so long that a part of it comes after its fault has been served.
const GROWING: [u32; 6] = [0, 1, 3, 7, 15, 31];

#[test]
fn what_came_ahead_of_every_fault_and_cannot_be_believed_kills_the_vm() {
    // One for each fault; the piece that comes behind the last one has none.
    let Some(mut staged) = Staged::of(Shown::new(GROWING.len() as u64), Policy::default()) else { return };
    let told: Vec<String> = GROWING.into_iter().flat_map(|page| staged.serve(&[], &[page], &[])).collect();
    let end = &told[told.len() - 3..];
    assert_eq!(end[..2], ["fill from a window 31..47", "fill from a window 47..63"]);
    assert!(end[2].starts_with("failed Some(47) "), "{end:?}");
}

/// How many faults it takes to touch 128 pages one after another, downwards.
fn faults_downwards(population: Population) -> Option<u32> {
    let mut staged = Staged::of(Shown::new(u64::MAX), Policy { population, ..Policy::default() })?;
    let mut faults = 0;
    for page in (0..128).rev() {
        if staged.session.pages().state(page) == PageState::Absent {
            staged.serve(&[], &[page], &[]);
            faults += 1;
        }
        while !staged.serve(&[], &[], &[]).is_empty() {}
    }
    Some(faults)
}

#[test]
fn a_run_that_goes_down_grows_as_well_where_all_comes_anyway() {
    let Some(alone) = faults_downwards(Population::None) else { return };
    assert!(alone <= 9, "{alone} faults");
    assert!(faults_downwards(Population::Background).unwrap() <= alone);
}

/// A session of two shards in this process, of which the second has memory.
fn halves(first: Userfaultfd) -> (Arc<Session>, Log) {
    let second = Userfaultfd::create(Features::empty()).unwrap();
    let region = Region { gpa: None, hva: 1 << 30, size: 8 * 4096, offset: 0, page_size: PageSize::Small };
    let layout = Layout::new(vec![region]).unwrap();
    let hello = Hello {
        form: Form::Latepage,
        name: None,
        vcpus: 1,
        backing: Backing::Anonymous,
        shards: Shards::equal(&layout, 2).unwrap(),
        layout,
        userfaultfds: vec![first, second],
        memory: None,
        notify: None,
    };
    let log = Log::default();
    let peer = Peer { pid: Some(std::process::id()), process: None, socket: None };
    let host = Arc::new(Ear(Arc::clone(&log)));
    (Session::new(1, hello, peer, Arc::new(Ones), Policy::default(), host).unwrap(), log)
}

#[test]
fn a_shard_that_cannot_be_served_does_not_end_the_session_of_another_that_can() {
    let Ok(unset) = Userfaultfd::open_by_device().or_else(|_| Userfaultfd::open_by_syscall()) else {
        eprintln!("skipped: no right to a userfaultfd");
        return;
    };
    let held = ["failed None held: the VM is part of the pager's own process"];
    // Its faults cannot be read; nor has it memory, as the VM that has ended has none.
    let (session, log) = halves(unset);
    for _ in 0..2 {
        session.serve(0, &mut Scratch::new());
        assert!(session.check_alive());
    }
    assert_eq!((session.end(), &log.lock().unwrap()[..]), (None, &held.map(str::to_owned)[..]));
    // Nobody would be told of its faults.
    let (session, log) = halves(Userfaultfd::create(Features::empty()).unwrap());
    session.not_watched(0, Errno::NOSPC);
    assert_eq!((session.end(), &log.lock().unwrap()[..]), (None, &held.map(str::to_owned)[..]));
}
