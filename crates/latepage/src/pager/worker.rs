//! A worker: one thread that serves the faults of many sessions, and waits for all of them in one epoll.
//!
//! Userfaultfds are watched edge-triggered: a fault that comes while another thread holds a session's gate rings once, that
//! thread serves it, and nobody spins. The signs of a VM's death are watched beside them.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

use super::bell::Bell;
use super::placement::{Scout, Stance};
use crate::memory::Shards;
use crate::session::{Scratch, Session};
use crate::sys::pidfd::PidFd;
use crate::sys::sched::{self, Cores};

/// The token of the bell; sessions' tokens have their place in the table, and below it what is watched: the process, the socket, or
/// one of its shards.
const BELL: u64 = u64::MAX;
const KINDS: u64 = 128;
const PROCESS: u64 = 0;
const SOCKET: u64 = 1;
const FAULTS: u64 = 2;
const _: () = assert!(Shards::MOST as u64 + FAULTS <= KINDS);

/// Faults after which a session's turn ends, though others of its shards have some: about what one shard's turn ends after.
const TURN: u32 = 256;

/// Faults after which the scout is called, if they came within so short a time.
const MANY: u32 = 8;
const SHORT: Duration = Duration::from_millis(8);

/// How soon a VM that showed a sign of death, but whose memory was still there, is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
const LOOK_AGAIN_AT_MOST: Duration = Duration::from_secs(1);

enum Order {
    Adopt(Arc<Session>, Share),
    LookAt(u64, usize),
    TakeDown(u64),
    Stop,
}

/// The shards of a session that a worker serves: one in so many, from the first that is its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub(super) first: usize,
    pub(super) step: usize,
}

impl Share {
    /// How many of so many shards they are.
    fn of(self, shards: usize) -> usize {
        shards.saturating_sub(self.first).div_ceil(self.step)
    }

    fn shard(self, at: usize) -> usize {
        self.first + at * self.step
    }

    fn find(self, shard: usize) -> usize {
        (shard - self.first) / self.step
    }
}

/// The side of a worker that other threads see.
pub(super) struct Worker {
    orders: Mutex<Vec<Order>>,
    bell: Bell,
    /// Its thread, set before anyone else sees it.
    thread: OnceLock<sched::Thread>,
    /// Where it runs and how it waits. Only the scout changes it.
    stance: Mutex<Stance>,
    /// How long it spins before it blocks, in ns: of its stance, where it costs nothing to look.
    spin: AtomicU64,
}

/// What a worker tells when a session is gone for good.
pub(super) type Farewell = Box<dyn Fn(&Arc<Session>) + Send>;

impl Worker {
    pub(super) fn start(
        number: usize,
        scout: Arc<Scout>,
        farewell: Farewell,
    ) -> std::io::Result<(Arc<Self>, JoinHandle<()>)> {
        let worker = Arc::new(Self {
            orders: Mutex::new(Vec::new()),
            bell: Bell::new()?,
            thread: OnceLock::new(),
            stance: Mutex::new(Stance::BLOCK),
            spin: AtomicU64::new(0),
        });
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &worker.bell, epoll::EventData::new_u64(BELL), epoll::EventFlags::IN)?;
        let mut thread = Thread {
            shared: Arc::clone(&worker),
            epoll,
            scout,
            slots: Vec::new(),
            places: HashMap::new(),
            ready: VecDeque::new(),
            timers: Vec::new(),
            scratch: Scratch::new(),
            farewell,
            spin_until: None,
            recent: 0,
            since: Instant::now(),
        };
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let handle = std::thread::Builder::new().name(format!("latepage-w{number}")).spawn(move || {
            let _ = tell.send(sched::Thread::this());
            thread.run();
        })?;
        if let Ok(thread) = told.recv() {
            let _ = worker.thread.set(thread);
        }
        Ok((worker, handle))
    }

    pub(super) fn stance(&self) -> Stance {
        *self.stance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records its stance, and has it spin as that says. Where it runs is said by [`run_on`](Self::run_on).
    pub(super) fn set_stance(&self, stance: Stance) {
        *self.stance.lock().unwrap_or_else(PoisonError::into_inner) = stance;
        self.spin.store(stance.spin.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Has its thread run on these cores only.
    pub(super) fn run_on(&self, cores: &Cores) -> Result<(), rustix::io::Errno> {
        self.thread.get().ok_or(rustix::io::Errno::SRCH)?.run_on(cores)
    }

    /// Its thread.
    pub(super) fn thread(&self) -> Option<sched::Thread> {
        self.thread.get().copied()
    }

    fn order(&self, order: Order) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
        self.bell.ring();
    }

    pub(super) fn adopt(&self, session: Arc<Session>, share: Share) {
        self.order(Order::Adopt(session, share));
    }

    pub(super) fn look_at(&self, session: u64, shard: usize) {
        self.order(Order::LookAt(session, shard));
    }

    pub(super) fn take_down(&self, session: u64) {
        self.order(Order::TakeDown(session));
    }

    pub(super) fn stop(&self) {
        self.order(Order::Stop);
    }
}

struct Slot {
    session: Arc<Session>,
    share: Share,
    shards: Box<[Served]>,
    /// Those of its shards that wait for this session's turn.
    ready: VecDeque<usize>,
    /// Waits in the worker's `ready`.
    queued: bool,
    /// When a VM that showed a sign of death is looked at again, and the pause after that.
    suspected: Option<(Instant, Duration)>,
}

/// A shard of a session, by its place among those that this worker serves.
#[derive(Clone, Copy, Default)]
struct Served {
    /// Waits in the session's `ready`.
    queued: bool,
    /// When parked faults are tried again.
    due: Option<Instant>,
}

impl Slot {
    fn new(session: Arc<Session>, share: Share) -> Self {
        let shards = share.of(session.shards());
        Self {
            session,
            share,
            shards: vec![Served::default(); shards].into(),
            ready: VecDeque::with_capacity(shards),
            queued: false,
            suspected: None,
        }
    }

    /// Has a shard wait for the session's turn. Whether the session now must be told to wait for one.
    fn enqueue(&mut self, shard: usize) -> bool {
        // A late event may mean a shard of the session that had this place before.
        let Some(served) = self.shards.get_mut(shard) else { return false };
        if !std::mem::replace(&mut served.queued, true) {
            self.ready.push_back(shard);
        }
        !std::mem::replace(&mut self.queued, true)
    }

    /// Serves its shards in their order, until enough was done for one turn. Returns how many faults that were.
    fn serve(&mut self, scratch: &mut Scratch) -> u32 {
        let mut faults = 0;
        for _ in 0..self.ready.len() {
            let Some(at) = self.ready.pop_front() else { break };
            self.shards[at].queued = false;
            let served = self.session.serve(self.share.shard(at), scratch);
            self.shards[at].due = served.due;
            faults += served.faults;
            if served.more {
                self.shards[at].queued = true;
                self.ready.push_back(at);
            }
            if served.more || faults >= TURN {
                break;
            }
        }
        faults
    }

    fn due(&self) -> Option<Instant> {
        self.shards.iter().filter_map(|served| served.due).min()
    }
}

/// A session's place in a worker's table. A free one is taken again, so that a late event may mean another session there: it is
/// served, or asked whether it lives, for nothing.
type At = usize;

struct Thread {
    shared: Arc<Worker>,
    epoll: std::os::fd::OwnedFd,
    scout: Arc<Scout>,
    slots: Vec<Option<Slot>>,
    /// Where each session is, for whoever knows only its id.
    places: HashMap<u64, At>,
    ready: VecDeque<At>,
    /// Sessions with a `due` or a `suspected`: few, and seldom.
    timers: Vec<At>,
    scratch: Scratch,
    farewell: Farewell,
    /// Until when it looks again and again instead of sleeping.
    spin_until: Option<Instant>,
    /// Faults since the scout was last thought of, and when that was.
    recent: u32,
    since: Instant,
}

impl Thread {
    fn run(&mut self) {
        let mut events = Vec::with_capacity(256);
        loop {
            events.clear();
            let timeout = self.timeout();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // The epoll is ours and its buffer is good: nothing else can come.
                Err(errno) => unreachable!("epoll_wait: {errno}"),
            }
            let mut orders = false;
            for event in &events {
                let token = event.data.u64();
                match token {
                    BELL => orders = true,
                    _ if token % KINDS >= FAULTS => {
                        self.enqueue((token / KINDS) as At, (token % KINDS - FAULTS) as usize)
                    }
                    _ => self.suspect((token / KINDS) as At, token % KINDS),
                }
            }
            if orders && self.follow_orders() {
                return;
            }
            // One turn for each session that is ready: a busy one goes to the end of the queue.
            for _ in 0..self.ready.len() {
                if let Some(at) = self.ready.pop_front() {
                    self.serve(at);
                }
            }
            self.run_timers();
        }
    }

    /// How long to sleep: not at all where there is something to do, or the next fault is expected in a moment.
    fn timeout(&mut self) -> Option<Timespec> {
        const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
        if !self.ready.is_empty() {
            return Some(AT_ONCE);
        }
        if let Some(until) = self.spin_until {
            if Instant::now() < until {
                // Whoever it waits for may want to run on this very core.
                rustix::thread::sched_yield();
                return Some(AT_ONCE);
            }
            self.spin_until = None;
        }
        let next = self
            .timers
            .iter()
            .filter_map(|at| self.slots[*at].as_ref())
            .flat_map(|slot| [slot.due(), slot.suspected.map(|(when, _)| when)])
            .flatten()
            .min()?;
        let left = next.saturating_duration_since(Instant::now());
        Some(Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) })
    }

    fn slot(&mut self, at: At) -> Option<&mut Slot> {
        self.slots.get_mut(at)?.as_mut()
    }

    fn enqueue(&mut self, at: At, shard: usize) {
        if let Some(slot) = self.slot(at)
            && slot.enqueue(shard)
        {
            self.ready.push_back(at);
        }
    }

    fn serve(&mut self, at: At) {
        let Some(slot) = self.slots.get_mut(at).and_then(Option::as_mut) else { return };
        let faults = slot.serve(&mut self.scratch);
        if slot.due().is_some() && !self.timers.contains(&at) {
            self.timers.push(at);
        }
        slot.queued = !slot.ready.is_empty();
        if slot.queued {
            self.ready.push_back(at);
        }
        let session = slot.session.id();
        if faults > 0 {
            self.after_faults(session, faults);
        }
    }

    /// Whoever faults often is worth a look at where he runs, and a moment of waiting for his next fault.
    fn after_faults(&mut self, session: u64, faults: u32) {
        let spin = self.shared.spin.load(Ordering::Relaxed);
        if spin > 0 {
            self.spin_until = Some(Instant::now() + Duration::from_nanos(spin));
        }
        self.recent += faults;
        if self.recent >= MANY {
            let now = Instant::now();
            if now.saturating_duration_since(self.since) < SHORT {
                self.scout.call(session);
            }
            (self.recent, self.since) = (0, now);
        }
    }

    /// Returns whether to stop.
    fn follow_orders(&mut self) -> bool {
        self.shared.bell.silence();
        let orders = std::mem::take(&mut *self.shared.orders.lock().unwrap_or_else(PoisonError::into_inner));
        let mut stop = false;
        for order in orders {
            match order {
                Order::Adopt(session, share) => self.adopt(session, share),
                Order::LookAt(id, shard) => {
                    if let Some(at) = self.places.get(&id).copied()
                        && let Some(slot) = self.slot(at)
                    {
                        let shard = slot.share.find(shard);
                        self.enqueue(at, shard);
                    }
                }
                Order::TakeDown(id) => self.take_down(id),
                Order::Stop => stop = true,
            }
        }
        stop
    }

    /// Whoever has the first shard watches the VM.
    fn adopt(&mut self, session: Arc<Session>, share: Share) {
        let at = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        let watch = |fd: BorrowedFd<'_>, kind, flags| {
            epoll::add(&self.epoll, fd, epoll::EventData::new_u64(at as u64 * KINDS + kind), flags)
        };
        if share.first == 0 {
            session.with_process(|process| {
                // Readable for ever once it has ended: one edge is enough.
                let _ = watch(process.as_fd(), PROCESS, epoll::EventFlags::IN | epoll::EventFlags::ET);
            });
            session.with_socket(|socket| {
                let _ = watch(socket, SOCKET, epoll::EventFlags::RDHUP | epoll::EventFlags::ET);
            });
        }
        let id = session.id();
        let slot = Slot::new(Arc::clone(&session), share);
        let shards = slot.shards.len();
        for shard in 0..shards {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            let mut refused = None;
            let faults = |fd: BorrowedFd<'_>| {
                refused = watch(fd, FAULTS + shard as u64, flags).err();
                refused.is_none()
            };
            session.with_descriptors(share.shard(shard), faults);
            if let Some(errno) = refused {
                // The VM lives, and so may its other shards. fs.epoll.max_user_watches says how many may be watched.
                session.not_watched(share.shard(shard), errno);
            }
        }
        self.places.insert(id, at);
        match self.slots.get_mut(at) {
            Some(free) => *free = Some(slot),
            None => self.slots.push(Some(slot)),
        }
        // Faults that came before the edge was watched.
        (0..shards).for_each(|shard| self.enqueue(at, shard));
        // By another worker's doing, before this one had it: whoever ended it was not heard here.
        if session.end().is_some() {
            self.take_down(id);
        }
    }

    /// A sign of death: its process has ended, or the socket was closed at the other end. Only its memory tells for sure, since
    /// another process may own it, and old VMMs close the socket at once.
    fn suspect(&mut self, at: At, kind: u64) {
        let Some(slot) = self.slot(at) else { return };
        if kind == SOCKET && slot.session.ends_with_its_socket() {
            return slot.session.finish(crate::session::End::Gone);
        }
        let closed_but_alive = kind == SOCKET && slot.session.with_process(PidFd::has_ended) == Some(false);
        if closed_but_alive || !slot.session.check_alive() {
            return;
        }
        slot.suspected = Some((Instant::now() + LOOK_AGAIN, LOOK_AGAIN));
        if !self.timers.contains(&at) {
            self.timers.push(at);
        }
    }

    fn run_timers(&mut self) {
        if self.timers.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut timers = std::mem::take(&mut self.timers);
        timers.retain(|at| {
            let Some(slot) = self.slots[*at].as_mut() else { return false };
            for shard in 0..slot.shards.len() {
                if slot.shards[shard].due.is_some_and(|due| due <= now) {
                    slot.shards[shard].due = None;
                    if slot.enqueue(shard) {
                        self.ready.push_back(*at);
                    }
                }
            }
            if let Some((when, pause)) = slot.suspected
                && when <= now
            {
                let pause = (pause * 2).min(LOOK_AGAIN_AT_MOST);
                slot.suspected = slot.session.check_alive().then_some((now + pause, pause));
            }
            slot.due().is_some() || slot.suspected.is_some()
        });
        self.timers = timers;
    }

    fn take_down(&mut self, id: u64) {
        let Some(slot) = self.places.remove(&id).and_then(|at| self.slots[at].take()) else { return };
        let forget = |fd: BorrowedFd<'_>| {
            let _ = epoll::delete(&self.epoll, fd);
        };
        if slot.share.first == 0 {
            // Another worker may close them, after this place in the table was given away.
            slot.session.with_process(|process| forget(process.as_fd()));
            slot.session.with_socket(forget);
        }
        let mut last = false;
        for shard in 0..slot.shards.len() {
            // The VMM may hold the same open file, and then closing ours would leave it in the epoll.
            last |= slot.session.take_down(slot.share.shard(shard), forget);
        }
        if last {
            (self.farewell)(&slot.session);
        }
    }
}
