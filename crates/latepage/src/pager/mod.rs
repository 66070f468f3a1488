//! Many sessions in one process: listeners, workers, and the threads that may block.
//!
//! | thread | how many | does |
//! |---|---|---|
//! | worker | one a core, four at most | serves faults; never blocks on a source, a log or Python |
//! | ring | one, where io_uring is allowed | reads what faults wait for, for sources that are files |
//! | reader | four | reads what a source did not have at hand |
//! | populator | one | brings pages before anyone asks |
//! | lane | as many as its source says | both, for one source that may take long: see `lanes.rs` |
//! | let-go | one | unregisters VMs that have all their memory; it never waits for a source |
//! | scout | one | finds out where workers best run: see `placement/`; asleep unless a VM faults a lot |
//! | attendant | one | handshakes, refused peers, stalls, sources |
//! | log | one, where a log is wanted | writes JSON lines |

mod arrivals;
mod attendant;
mod bell;
mod cold;
mod condemned;
mod events;
mod follow;
mod host;
mod lanes;
mod listener;
mod placement;
mod pool;
mod spare;
mod worker;

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::attachment::{Form, Hello, Refusal, RefusalReason};
use crate::session::{
    Action, End, Host, LetGo, OnMissing, Peer as SessionPeer, Placement, Policy, Population, Report, Scratch,
    Session,
};
use crate::source::Source;
use crate::stats::StatsSnapshot;
use crate::sys::pidfd::{Peer, PidFd};
use attendant::{Attendant, Listener};
use cold::ColdReads;
use lanes::{Lane, Lanes};
use listener::ListeningSocket;
use placement::Scout;
use pool::{Job, Pool};
use worker::{Share, Worker};

pub use arrivals::Arrivals;
pub use events::{Event, Events, What};
pub use follow::{Following, Touched};
pub use listener::ListenError;

/// How a pager is made.
#[derive(Debug, Default)]
pub struct Config {
    /// Threads that serve faults; `None` for one a core, four at most.
    pub workers: Option<usize>,
    /// Threads that read what a source did not have at hand; `None` for four.
    pub readers: Option<usize>,
    /// Threads that bring pages before anyone asks; `None` for one.
    pub populators: Option<usize>,
    /// The priority of workers in the real-time class SCHED_FIFO, 1 to 99; `None` leaves them in the class that they are born in.
    pub realtime: Option<u8>,
    /// The nice value of workers, -20 to 19; `None` leaves it.
    pub nice: Option<i8>,
    /// Whether what faults wait for is read by io_uring where that is allowed; `None` for yes. Else the readers do it.
    pub io_uring: Option<bool>,
    /// Where every event is written, one JSON object a line.
    pub log: Option<OwnedFd>,
}

/// Something that was wished for and cannot be had, and was done in another way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// What was wished for: `realtime`, `nice`, `placement` or `io_uring`.
    pub wish: &'static str,
    /// Why it cannot be had, and what was done.
    pub reason: String,
}

/// How long closing waits for VMs that were killed to be gone, and then for its threads.
const LAST_WAIT: Duration = Duration::from_secs(5);
/// Between two looks at a thread that is about to end.
const A_MOMENT: Duration = Duration::from_millis(1);

/// Serves the memory of many VMs.
pub struct Pager {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the threads of a pager share.
struct Shared {
    /// Sessions hold it as their host.
    this: Weak<Self>,
    events: Events,
    sessions: Mutex<Sessions>,
    /// A session has become full, or is gone.
    changed: Condvar,
    workers: OnceLock<Vec<Arc<Worker>>>,
    scout: Arc<Scout>,
    lanes: Lanes,
    cold: OnceLock<Arc<ColdReads>>,
    detachers: Arc<Pool>,
    attendant: Attendant,
    fallbacks: Mutex<Vec<Fallback>>,
    /// Programs that direct population.
    followings: Mutex<Vec<Arc<Following>>>,
    next: AtomicU64,
    /// Held while a VM is let in, and while the pager becomes one that lets no more in: no VM falls between.
    door: Mutex<()>,
    draining: AtomicBool,
    /// Whether the danger of poison has been told of.
    warned_of_poison: AtomicBool,
    /// What follows [`What::Draining`] has been told, or is not to be.
    drained: AtomicBool,
}

struct Sessions {
    live: BTreeMap<u64, Arc<Session>>,
    /// What those did that are over.
    ended: StatsSnapshot,
    /// Who wants to hear of every one.
    arrivals: Vec<Weak<Arrivals>>,
}

impl Sessions {
    fn begin(&mut self, id: u64, session: &Arc<Session>) {
        self.live.insert(id, Arc::clone(session));
        // Those that nobody holds any more are forgotten on the way.
        self.arrivals
            .retain(|arrivals| arrivals.upgrade().inspect(|arrivals| arrivals.add(session)).is_some());
    }
}

impl Pager {
    /// Starts the threads of a pager.
    ///
    /// # Errors
    /// What the start of a thread, or one of their descriptors, said.
    pub fn start(config: Config) -> std::io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = config.workers.unwrap_or_else(|| cores.min(4)).max(1);
        let events = Events::new(config.log)?;
        let attendant = Attendant::new()?;
        let sizes =
            [("read", config.readers.unwrap_or(4)), ("pop", config.populators.unwrap_or(1)), ("let-go", 1)];
        let ([readers, populators, detachers], threads) = pool::start_all(sizes)?;
        let shared = Arc::new_cyclic(|this| Shared {
            this: Weak::clone(this),
            events,
            sessions: Mutex::new(Sessions {
                live: BTreeMap::new(),
                ended: StatsSnapshot::default(),
                arrivals: Vec::new(),
            }),
            changed: Condvar::new(),
            workers: OnceLock::new(),
            scout: Arc::new(Scout::new()),
            lanes: Lanes::new(Lane { readers, populators }),
            cold: OnceLock::new(),
            detachers,
            attendant,
            fallbacks: Mutex::new(Vec::new()),
            followings: Mutex::new(Vec::new()),
            next: AtomicU64::new(1),
            door: Mutex::new(()),
            draining: AtomicBool::new(false),
            warned_of_poison: AtomicBool::new(false),
            drained: AtomicBool::new(true),
        });
        let pager = Self { shared: Arc::clone(&shared), threads: Mutex::new(threads) };
        let mut started = Vec::new();
        let mut failed = None;
        for number in 0..workers {
            let this = Weak::clone(&shared.this);
            let farewell = Box::new(move |session: &Arc<Session>| {
                if let Some(shared) = this.upgrade() {
                    shared.farewell(session);
                }
            });
            match Worker::start(number, Arc::clone(&shared.scout), farewell) {
                Ok((worker, handle)) => {
                    pager.threads().push(handle);
                    shared.prefer(&worker, config.realtime, config.nice);
                    started.push(worker);
                }
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        // It was empty: nobody else has had the shared part yet. Those that were started are ended with the pager, however few.
        let _ = shared.workers.set(started);
        if let Some(error) = failed {
            return Err(error);
        }
        if config.io_uring != Some(false) {
            pager.threads().extend(shared.read_by_ring());
        }
        pager.threads().push(Scout::start(&shared)?);
        pager.threads().push(Attendant::start(&shared)?);
        Ok(pager)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes VMs at a socket path, each to be served from `source`. It is listening when this returns.
    ///
    /// # Errors
    /// [`ListenError`]: the path is taken, or no path for a socket; the pager is draining.
    pub fn listen(&self, path: &Path, source: Arc<dyn Source>, policy: Policy) -> Result<(), ListenError> {
        self.listen_and(path, source, policy, None)
    }

    /// As [`listen`](Self::listen), and has a program say what is populated: it asks `following` what the VMs touch, and answers with
    /// [`populate_next`](Self::populate_next). `policy.trace` says how much may be touched between two looks.
    ///
    /// # Errors
    /// As of [`listen`](Self::listen).
    pub fn listen_and_follow(
        &self,
        path: &Path,
        source: Arc<dyn Source>,
        policy: Policy,
        following: Arc<Following>,
    ) -> Result<(), ListenError> {
        self.listen_and(path, source, policy, Some(following))
    }

    fn listen_and(
        &self,
        path: &Path,
        source: Arc<dyn Source>,
        policy: Policy,
        following: Option<Arc<Following>>,
    ) -> Result<(), ListenError> {
        // Closed meanwhile, the pager would not know of the threads that are started here.
        let _door = self.shared.door();
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(ListenError::Draining { path: path.to_owned() });
        }
        let socket = ListeningSocket::bind(path, policy.mode, policy.owner)?;
        self.shared.check_placement(policy.placement);
        let threads = self.shared.lanes.open(&source).map_err(|error| ListenError::Call {
            path: path.to_owned(),
            call: "clone",
            errno: Errno::from_io_error(&error).unwrap_or(Errno::AGAIN),
        })?;
        self.threads().extend(threads);
        let path = socket.path().display().to_string();
        self.shared.events.emit(What::Listening {
            socket: path.clone(),
            source: source.describe(),
            size: source.size(),
        });
        self.shared.followings().extend(following.clone());
        self.shared.attendant.listen(Arc::new(Listener { path, source, policy, following }), socket);
        Ok(())
    }

    /// The VMs that are served now, oldest first.
    pub fn sessions(&self) -> Vec<Arc<Session>> {
        self.shared.all_sessions()
    }

    /// Every VM that is served now, and each that comes from now on, none missing: also one that is gone in a moment.
    pub fn arrivals(&self) -> Arc<Arrivals> {
        let arrivals = Arc::new(Arrivals::default());
        let mut sessions = self.shared.sessions();
        sessions.live.values().for_each(|session| arrivals.add(session));
        sessions.arrivals.push(Arc::downgrade(&arrivals));
        arrivals
    }

    /// What happened.
    pub fn events(&self) -> &Events {
        &self.shared.events
    }

    /// A descriptor that polls readable while events wait.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.shared.events.descriptor()
    }

    /// Whether what faults wait for is read by io_uring, and not by threads.
    pub fn reads_by_ring(&self) -> bool {
        self.shared.cold.get().is_some_and(|reads| !reads.is_over())
    }

    /// What was wished for and could not be had, each once.
    pub fn fallbacks(&self) -> Vec<Fallback> {
        self.shared.fallbacks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How each worker waits now: `block`, `spin`, or `core`, which is to block on a core that was chosen for it.
    pub fn workers(&self) -> Vec<&'static str> {
        self.shared.workers.get().into_iter().flatten().map(|worker| worker.stance().name()).collect()
    }

    /// What all sessions have done together, those that are over among them.
    pub fn totals(&self) -> StatsSnapshot {
        let sessions = self.shared.sessions();
        let mut totals = sessions.ended.clone();
        for session in sessions.live.values() {
            totals.merge(&session.stats().snapshot());
        }
        totals
    }

    /// Has pages brought ahead of their faults; faults still go first. Returns at once.
    pub fn populate(&self, session: &Arc<Session>, ranges: impl IntoIterator<Item = Range<u32>>) {
        let job = Job::Populate(Arc::clone(session), ranges.into_iter().collect());
        self.shared.lanes.of(session).populators.submit(job);
    }

    /// Has pages brought next, before all that was named for this VM in this way and has not come yet. Returns at once. Without
    /// effect where the VM is not followed, or its population has met an error.
    pub fn populate_next(
        &self,
        following: &Following,
        session: &Arc<Session>,
        ranges: impl IntoIterator<Item = Range<u32>>,
    ) {
        if let Some(plan) = following.plan(session)
            && plan.add(ranges.into_iter().collect())
        {
            self.shared.lanes.of(session).populators.submit(Job::Follow(Arc::clone(session), plan));
        }
    }

    /// Tells of something among the events and in the log: for a program that makes the pager do what it does.
    pub fn warn(&self, what: String) {
        self.shared.events.emit(What::Warning { what });
    }

    /// Waits until a VM has all its memory, or is gone, or the time is over. Returns whether it has all its memory.
    pub fn wait_populated(&self, session: &Session, timeout: Option<Duration>) -> bool {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut sessions = self.shared.sessions();
        loop {
            if session.owed() == 0 {
                return true;
            }
            if session.end().is_some() {
                return false;
            }
            sessions = match deadline {
                None => self.shared.changed.wait(sessions).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    self.shared.changed.wait_timeout(sessions, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Takes no new VMs, brings what the live ones lack, and lets each go. Returns at once; [`What::Drained`] tells the end.
    pub fn drain(&self) {
        self.shared.drain();
    }

    /// Ends the pager. VMs that still lack memory are treated as their policy says.
    ///
    /// Returns the names of those, and of VMs that have all their memory but cannot be let go: their next discard will wait for
    /// ever, since nobody reads its event. [`What::Left`] tells which is which.
    pub fn close(&self) -> Vec<String> {
        {
            let _door = self.shared.door();
            self.shared.draining.store(true, Ordering::Release);
        }
        self.shared.attendant.stop_listening();
        let deadline = Instant::now() + LAST_WAIT;
        let mut scratch = Scratch::new();
        let (mut lacking, mut leaving) = (Vec::new(), Vec::new());
        for session in self.shared.all_sessions() {
            let mut leaves = false;
            if session.owed() > 0 {
                lacking.push(session.name().to_owned());
                // Here and now: the threads that could do it may be waiting for a source.
                leaves = session.give_up(&mut scratch) == Action::Killed;
            }
            // It is full, or what it lacked is poisoned.
            if session.owed() == 0 {
                while session.detach(&mut scratch) == LetGo::NotYet && Instant::now() < deadline {
                    std::thread::yield_now();
                }
                leaves |= session.end().is_some();
            }
            if leaves {
                leaving.push(session.id());
            } else {
                let vm = session.name().to_owned();
                if !lacking.contains(&vm) {
                    lacking.push(vm.clone());
                }
                self.shared.events.emit(What::Left { vm, lacking: session.owed() });
            }
        }
        self.shared.wait_for(&leaving, deadline);
        for session in self.shared.all_sessions() {
            session.finish(End::Closed);
        }
        self.shared.stop();
        let threads = std::mem::take(&mut *self.threads());
        let deadline = Instant::now() + LAST_WAIT;
        for thread in threads {
            // One that reads from a source which never answers cannot be had back: it is left to the end of the process.
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(A_MOMENT);
            }
            if thread.is_finished() {
                // One that panicked has said so on standard error, and is gone all the same.
                let _ = thread.join();
            }
        }
        self.shared.events.close();
        lacking
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        if !self.threads().is_empty() {
            self.close();
        }
    }
}

impl Shared {
    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_sessions(&self) -> Vec<Arc<Session>> {
        self.sessions().live.values().cloned().collect()
    }

    fn followings(&self) -> MutexGuard<'_, Vec<Arc<Following>>> {
        self.followings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn door(&self) -> MutexGuard<'_, ()> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says once that something goes another way than was wished for.
    fn fall_back(&self, wish: &'static str, reason: String) {
        let mut fallbacks = self.fallbacks.lock().unwrap_or_else(PoisonError::into_inner);
        let fallback = Fallback { wish, reason };
        if !fallbacks.contains(&fallback) {
            self.events.emit(What::Warning { what: fallback.reason.clone() });
            fallbacks.push(fallback);
        }
    }

    /// Has an io_uring read what faults wait for, if there is one to be had, and returns its thread.
    fn read_by_ring(self: &Arc<Self>) -> Option<JoinHandle<()>> {
        let readers = Arc::clone(&self.lanes.shared().readers);
        let otherwise = Box::new(move |session, page| readers.submit(Job::Read(session, page)));
        let pager = Arc::downgrade(self);
        let tell = Box::new(move |errno| {
            if let Some(pager) = pager.upgrade() {
                pager.without_ring(errno);
            }
        });
        match ColdReads::start(otherwise, tell) {
            Ok((reads, thread)) => {
                let _ = self.cold.set(reads);
                Some(thread)
            }
            Err(errno) => {
                self.without_ring(errno);
                None
            }
        }
    }

    fn without_ring(&self, errno: Errno) {
        let reason =
            format!("io_uring: {errno}; what is not in memory is read by threads, a few pages at a time");
        self.fall_back("io_uring", reason);
    }

    /// Gives a worker its place among the threads of the machine, as far as that is allowed.
    fn prefer(&self, worker: &Worker, realtime: Option<u8>, nice: Option<i8>) {
        let Some(thread) = worker.thread() else { return };
        if let Some(priority) = realtime
            && let Err(errno) = thread.real_time(priority)
        {
            let reason = format!(
                "workers cannot be real-time (SCHED_FIFO {priority}): {errno}; they stay in the ordinary class. It takes CAP_SYS_NICE, \
                 or RLIMIT_RTPRIO of {priority} (systemd: LimitRTPRIO={priority})"
            );
            self.fall_back("realtime", reason);
        }
        if let Some(value) = nice
            && let Err(errno) = thread.nice(value)
        {
            let reason = format!(
                "workers cannot have nice {value}: {errno}; they keep theirs. It takes CAP_SYS_NICE, or RLIMIT_NICE of {} (systemd: \
                 LimitNICE={value})",
                20 - value
            );
            self.fall_back("nice", reason);
        }
    }

    /// A core that is not there, or not ours, is no place.
    fn check_placement(&self, placement: Placement) {
        let machine = self.scout.machine();
        if let Placement::Core(core) = placement
            && !machine.may_use(core)
        {
            let cores: Vec<String> = machine.allowed().iter().map(|core| core.to_string()).collect();
            let reason = format!(
                "placement core:{core}: this process has no core {core}, only {}; VMs are placed as with auto",
                cores.join(", ")
            );
            self.fall_back("placement", reason);
        }
    }

    /// The worker of a session's shard: shards are dealt out, one worker after the other.
    fn worker(&self, session: u64, shard: usize) -> Option<&Worker> {
        let workers = self.workers.get()?;
        Some(&workers[(session as usize).wrapping_add(shard) % workers.len()])
    }

    /// The workers of a session, each with its share of it.
    fn workers_of(&self, session: &Session) -> impl Iterator<Item = (&Worker, Share)> {
        let (id, step) = (session.id(), self.workers.get().map_or(0, Vec::len));
        let shares = 0..step.min(session.shards());
        shares.filter_map(move |first| Some((self.worker(id, first)?, Share { first, step })))
    }

    /// Makes a session of a VM whose handshake was good, or says why not, and gives back what belongs to it.
    #[allow(clippy::type_complexity, reason = "everything that is known of a peer, given back")]
    fn admit(
        self: &Arc<Self>,
        mut hello: Hello,
        socket: OwnedFd,
        peer: Peer,
        process: Option<PidFd>,
        listener: &Listener,
    ) -> Option<(Refusal, OwnedFd, Option<PidFd>, Option<String>)> {
        let _door = self.door();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let name = self.name(hello.name.take(), peer.pid, id);
        let reason = match self.draining.load(Ordering::Acquire) {
            true => Some(RefusalReason::Draining),
            false => listener.source.admit(&hello.layout).err().map(RefusalReason::from),
        };
        if let Some(reason) = reason {
            let refusal = Refusal { reason, userfaultfds: hello.userfaultfds, layout: Some(hello.layout) };
            return Some((refusal, socket, process, Some(name)));
        }
        hello.name = Some(name);
        let peer = SessionPeer { pid: peer.pid, process, socket: Some(socket) };
        let host: Arc<dyn Host> = Arc::clone(self) as _;
        let made = Session::new(id, hello, peer, Arc::clone(&listener.source), listener.policy.clone(), host);
        let session = match made {
            Ok(session) => session,
            Err(failed) => {
                let failed = *failed;
                let reason = RefusalReason::Mapping(failed.error);
                let refusal = Refusal { reason, userfaultfds: failed.userfaultfds, layout: None };
                let socket = failed.peer.socket.expect("it was given above");
                return Some((refusal, socket, failed.peer.process, failed.name));
            }
        };
        // Whoever hears of it finds it.
        self.sessions().begin(id, &session);
        self.events.emit(What::SessionStarted {
            vm: session.name().to_owned(),
            pid: session.pid().unwrap_or(0),
            form: session.form().name(),
            backing: session.backing().name(),
            size: session.layout().bytes(),
            vcpus: session.vcpus(),
            source: listener.source.describe(),
        });
        if session.owed() == 0 {
            // The pager before has brought all of it.
            self.report(&session, Report::Full);
        }
        self.warn_of_poison(&session);
        for (worker, share) in self.workers_of(&session) {
            worker.adopt(Arc::clone(&session), share);
        }
        if let Some(following) = &listener.following {
            following.adopt(Arc::clone(&session));
        }
        if session.policy().population == Population::Background {
            self.bring_all(session);
        }
        None
    }

    /// Firecracker answers the MMIO exit, as which a poisoned page comes out where KVM emulates its guests, with zero.
    fn warn_of_poison(&self, session: &Session) {
        if session.policy().on_missing == OnMissing::Poison
            && session.form() == Form::Firecracker
            && !self.warned_of_poison.swap(true, Ordering::Relaxed)
        {
            let what = "--on-missing poison is not safe with Firecracker on every host: a guest may read zeros where a page \
                        could not be had; use kill";
            self.events.emit(What::Warning { what: what.to_owned() });
        }
    }

    /// A name that no live session has.
    fn name(&self, said: Option<String>, pid: Option<u32>, id: u64) -> String {
        let name =
            said.unwrap_or_else(|| pid.map_or_else(|| format!("session-{id}"), |pid| format!("vm-{pid}")));
        let taken = self.sessions().live.values().any(|session| session.name() == name);
        if taken { format!("{name}#{id}") } else { name }
    }

    fn bring_all(&self, session: Arc<Session>) {
        self.lanes.of(&session).populators.submit(Job::PopulateAll(session, 0));
    }

    /// Brings all that is lacking to the sessions that `which` names.
    fn hurry(&self, which: impl Fn(&Session) -> bool) {
        for session in self.all_sessions() {
            if which(&session) && session.owed() > 0 {
                self.bring_all(session);
            }
        }
    }

    fn drain(&self) {
        let sessions = {
            let _door = self.door();
            if self.draining.swap(true, Ordering::AcqRel) {
                return;
            }
            self.all_sessions()
        };
        self.attendant.stop_listening();
        self.events.emit(What::Draining { vms: sessions.len() });
        self.drained.store(false, Ordering::Release);
        for session in sessions {
            if session.owed() == 0 {
                self.let_go(&session);
            } else {
                self.bring_all(session);
            }
        }
        self.drained();
    }

    /// A full session is not needed any more, unless its memory must stay registered.
    fn let_go(&self, session: &Session) {
        if let Some(reason) = session.kept_because() {
            return self.events.emit(What::WaitingFor { vm: session.name().to_owned(), reason });
        }
        if let Some(session) = self.sessions().live.get(&session.id()) {
            self.detachers.submit(Job::Detach(Arc::clone(session)));
        }
    }

    fn drained(&self) {
        if self.sessions().live.is_empty() && !self.drained.swap(true, Ordering::AcqRel) {
            self.events.emit(What::Drained);
        }
    }

    /// A session is over and taken down.
    fn farewell(&self, session: &Arc<Session>) {
        let stats = {
            let mut sessions = self.sessions();
            // Taken where `totals` cannot come between: no total ever goes back.
            let stats = session.stats().snapshot();
            sessions.live.remove(&session.id());
            if !sessions.live.values().any(|other| std::ptr::addr_eq(other.source(), session.source())) {
                session.source().idle();
            }
            sessions.ended.merge(&stats);
            stats
        };
        let vm = session.name().to_owned();
        let reason = match session.end() {
            Some(End::Detached) => {
                self.events.emit(What::Detached { vm: vm.clone() });
                "detached"
            }
            Some(End::Closed) => "closed",
            Some(End::Gone) | None => "gone",
        };
        self.events.emit(What::Ended {
            vm,
            reason,
            seconds: session.started().elapsed().as_secs_f64(),
            faults: stats.counters.faults,
            lacking: session.owed(),
        });
        self.changed.notify_all();
        self.drained();
    }

    /// Waits until these sessions are gone, if they go in time.
    fn wait_for(&self, leaving: &[u64], deadline: Instant) {
        let mut sessions = self.sessions();
        while leaving.iter().any(|id| sessions.live.contains_key(id)) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            sessions = self.changed.wait_timeout(sessions, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn stop(&self) {
        self.attendant.stop();
        self.scout.stop();
        if let Some(cold) = self.cold.get() {
            cold.stop();
        }
        self.lanes.stop();
        self.detachers.stop();
        let followings = std::mem::take(&mut *self.followings());
        followings.iter().for_each(|following| following.end());
        for worker in self.workers.get().into_iter().flatten() {
            worker.stop();
        }
    }
}
