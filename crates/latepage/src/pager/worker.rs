//! A worker: one thread that serves the faults of many sessions, and waits for all of them in one epoll.
//!
//! Userfaultfds are watched edge-triggered: a fault that comes while another thread holds a session's gate rings once, that
//! thread serves it, and nobody spins. The signs of a VM's death are watched beside them.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

use super::bell::Bell;
use crate::session::{Scratch, Session};
use crate::sys::pidfd::PidFd;

/// The token of the bell; sessions' tokens are three for each id.
const BELL: u64 = u64::MAX;
const KINDS: u64 = 3;
const FAULTS: u64 = 0;
const PROCESS: u64 = 1;
const SOCKET: u64 = 2;

/// How soon a VM that showed a sign of death, but whose memory was still there, is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
const LOOK_AGAIN_AT_MOST: Duration = Duration::from_secs(1);

enum Order {
    Adopt(Arc<Session>),
    LookAt(u64),
    TakeDown(u64),
    Stop,
}

/// The side of a worker that other threads see.
pub(super) struct Worker {
    orders: Mutex<Vec<Order>>,
    bell: Bell,
}

/// What a worker tells when a session is gone for good.
pub(super) type Farewell = Box<dyn Fn(&Arc<Session>) + Send>;

impl Worker {
    pub(super) fn start(number: usize, farewell: Farewell) -> std::io::Result<(Arc<Self>, JoinHandle<()>)> {
        let worker = Arc::new(Self { orders: Mutex::new(Vec::new()), bell: Bell::new()? });
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &worker.bell, epoll::EventData::new_u64(BELL), epoll::EventFlags::IN)?;
        let mut thread = Thread {
            shared: Arc::clone(&worker),
            epoll,
            sessions: HashMap::new(),
            ready: VecDeque::new(),
            timers: Vec::new(),
            scratch: Scratch::new(),
            farewell,
        };
        let handle =
            std::thread::Builder::new().name(format!("latepage-w{number}")).spawn(move || thread.run())?;
        Ok((worker, handle))
    }

    fn order(&self, order: Order) {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
        self.bell.ring();
    }

    pub(super) fn adopt(&self, session: Arc<Session>) {
        self.order(Order::Adopt(session));
    }

    pub(super) fn look_at(&self, session: u64) {
        self.order(Order::LookAt(session));
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
    /// Waits in `ready`.
    queued: bool,
    /// When parked faults are tried again.
    due: Option<Instant>,
    /// When a VM that showed a sign of death is looked at again, and the pause after that.
    suspected: Option<(Instant, Duration)>,
}

struct Thread {
    shared: Arc<Worker>,
    epoll: std::os::fd::OwnedFd,
    sessions: HashMap<u64, Slot>,
    ready: VecDeque<u64>,
    /// Sessions with a `due` or a `suspected`: few, and seldom.
    timers: Vec<u64>,
    scratch: Scratch,
    farewell: Farewell,
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
                    _ if token % KINDS == FAULTS => self.enqueue(token / KINDS),
                    _ => self.suspect(token / KINDS, token % KINDS),
                }
            }
            if orders && self.follow_orders() {
                return;
            }
            // One turn for each session that is ready: a busy one goes to the end of the queue.
            for _ in 0..self.ready.len() {
                if let Some(id) = self.ready.pop_front() {
                    self.serve(id);
                }
            }
            self.run_timers();
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        if !self.ready.is_empty() {
            return Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        }
        let next = self
            .timers
            .iter()
            .filter_map(|id| self.sessions.get(id))
            .flat_map(|slot| [slot.due, slot.suspected.map(|(when, _)| when)])
            .flatten()
            .min()?;
        let left = next.saturating_duration_since(Instant::now());
        Some(Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) })
    }

    fn enqueue(&mut self, id: u64) {
        if let Some(slot) = self.sessions.get_mut(&id)
            && !std::mem::replace(&mut slot.queued, true)
        {
            self.ready.push_back(id);
        }
    }

    fn serve(&mut self, id: u64) {
        let Some(slot) = self.sessions.get_mut(&id) else { return };
        slot.queued = false;
        let served = slot.session.serve(&mut self.scratch);
        slot.due = served.due;
        if served.due.is_some() && !self.timers.contains(&id) {
            self.timers.push(id);
        }
        if served.more {
            self.enqueue(id);
        }
    }

    /// Returns whether to stop.
    fn follow_orders(&mut self) -> bool {
        self.shared.bell.silence();
        let orders = std::mem::take(&mut *self.shared.orders.lock().unwrap_or_else(PoisonError::into_inner));
        let mut stop = false;
        for order in orders {
            match order {
                Order::Adopt(session) => self.adopt(session),
                Order::LookAt(id) => self.enqueue(id),
                Order::TakeDown(id) => self.take_down(id),
                Order::Stop => stop = true,
            }
        }
        stop
    }

    fn adopt(&mut self, session: Arc<Session>) {
        let id = session.id();
        let watch = |fd: BorrowedFd<'_>, kind, flags| {
            epoll::add(&self.epoll, fd, epoll::EventData::new_u64(id * KINDS + kind), flags)
        };
        session.with_process(|process| {
            // Readable for ever once it has ended: one edge is enough.
            let _ = watch(process.as_fd(), PROCESS, epoll::EventFlags::IN | epoll::EventFlags::ET);
        });
        session.with_socket(|socket| {
            let _ = watch(socket, SOCKET, epoll::EventFlags::RDHUP | epoll::EventFlags::ET);
        });
        let watched = session
            .with_descriptor(|fd| watch(fd, FAULTS, epoll::EventFlags::IN | epoll::EventFlags::ET))
            .unwrap_or(Ok(()));
        if watched.is_err() {
            // A userfaultfd whose creator has not done UFFDIO_API cannot be polled, and can have no faults.
            session.finish(crate::session::End::Gone);
        }
        let slot = Slot { session, queued: false, due: None, suspected: None };
        self.sessions.insert(id, slot);
        // Faults that came before the edge was watched.
        self.enqueue(id);
    }

    /// A sign of death: its process has ended, or the socket was closed at the other end. Only its memory tells for sure, since
    /// another process may own it, and old VMMs close the socket at once.
    fn suspect(&mut self, id: u64, kind: u64) {
        let Some(slot) = self.sessions.get_mut(&id) else { return };
        let closed_but_alive = kind == SOCKET && slot.session.with_process(PidFd::has_ended) == Some(false);
        if closed_but_alive || !slot.session.check_alive() {
            return;
        }
        slot.suspected = Some((Instant::now() + LOOK_AGAIN, LOOK_AGAIN));
        if !self.timers.contains(&id) {
            self.timers.push(id);
        }
    }

    fn run_timers(&mut self) {
        if self.timers.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut timers = std::mem::take(&mut self.timers);
        timers.retain(|id| {
            let Some(slot) = self.sessions.get_mut(id) else { return false };
            if slot.due.is_some_and(|due| due <= now) {
                slot.due = None;
                if !std::mem::replace(&mut slot.queued, true) {
                    self.ready.push_back(*id);
                }
            }
            if let Some((when, pause)) = slot.suspected
                && when <= now
            {
                let pause = (pause * 2).min(LOOK_AGAIN_AT_MOST);
                slot.suspected = slot.session.check_alive().then_some((now + pause, pause));
            }
            slot.due.is_some() || slot.suspected.is_some()
        });
        self.timers = timers;
    }

    fn take_down(&mut self, id: u64) {
        let Some(slot) = self.sessions.remove(&id) else { return };
        // The VMM may hold the same open file, and then closing ours would leave it in the epoll.
        slot.session.take_down(|fd| {
            let _ = epoll::delete(&self.epoll, fd);
        });
        (self.farewell)(&slot.session);
    }
}
