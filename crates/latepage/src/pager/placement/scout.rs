//! The scout: a thread that looks at VMs that fault a lot, and has their workers run where that pays. It sleeps while none does.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::super::Shared;
use super::super::worker::Worker;
use super::tasks::Tasks;
use super::{Machine, On, Stance, decide};
use crate::session::{Placement, Session};
use crate::stats::GapsSnapshot;

/// From a call to the first look: long enough to see who sleeps most.
const FIRST: Duration = Duration::from_micros(500);
/// Between the next two looks; twice as long each time that nothing has changed.
const SOON: Duration = Duration::from_millis(2);
const SELDOM: Duration = Duration::from_millis(32);
/// Between two looks at where the thread runs that a worker follows, at least: the scheduler may move it at any time.
const STEP: Duration = Duration::from_millis(1);
/// Faults for which such a glance is worth its cost, and a whole look at a VM that has been looked at for a while.
const WORTH_A_GLANCE: u32 = 16;
const WORTH_A_LOOK: u32 = 256;
/// Moves between two looks after which nobody runs after a thread for a while. Where a core is idle, the scheduler may wake it there
/// each time, since its own is the worker's.
const STAYS: u32 = 1;
const RESTLESS: Duration = Duration::from_millis(200);
/// A look that took more CPU is dear: a VM of hundreds of threads takes ten milliseconds. It is paid for with so many times as long a
/// rest, so that looking never takes more than three hundredths of a core from those who fault.
const DEAR: Duration = Duration::from_micros(500);
const REST: u32 = 32;
/// A worker that serves fewer faults a second is left alone: nobody would notice.
const LIVELY: u64 = 500;
/// Most of a worker's work: three quarters.
const fn is_most(part: u64, all: u64) -> bool {
    part * 4 >= all * 3
}
/// Looks without a lively worker after which it sleeps until it is called.
const PATIENCE: u32 = 4;
/// After it was called for nothing, it does not hear calls for so long; twice as long each time.
const DEAF: Duration = Duration::from_millis(16);
const DEAF_AT_MOST: Duration = Duration::from_secs(1);

/// The side of the scout that workers see.
#[derive(Debug)]
pub(in crate::pager) struct Scout {
    listens: AtomicBool,
    /// The VM that it was called for.
    caller: AtomicU64,
    stop: AtomicBool,
    thread: OnceLock<Thread>,
    machine: Machine,
}

impl Scout {
    pub(in crate::pager) fn new() -> Self {
        Self {
            listens: AtomicBool::new(false),
            caller: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            thread: OnceLock::new(),
            machine: Machine::this(),
        }
    }

    pub(in crate::pager) fn start(shared: &Arc<Shared>) -> std::io::Result<JoinHandle<()>> {
        let weak = Arc::downgrade(shared);
        let scout = Arc::clone(&shared.scout);
        let this = Arc::clone(&scout);
        let handle = std::thread::Builder::new()
            .name("latepage-scout".to_owned())
            .spawn(move || Round::new(this, weak).run())?;
        // Nobody else sets it.
        let _ = scout.thread.set(handle.thread().clone());
        Ok(handle)
    }

    /// The machine that it knows.
    pub(in crate::pager) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// There is something to see about this session. Costs one load where the scout is up already, or does not want to know.
    #[inline]
    pub(in crate::pager) fn call(&self, session: u64) {
        if self.listens.load(Ordering::Relaxed) {
            self.caller.store(session, Ordering::Relaxed);
            if !self.listens.swap(false, Ordering::AcqRel) {
                return;
            }
            self.unpark();
        }
    }

    pub(in crate::pager) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.unpark();
    }

    fn unpark(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

/// A VM that keeps a worker busy.
struct Watched {
    /// Of its process; `None` where it cannot be seen, or is the pager's own.
    tasks: Option<Tasks>,
    gaps: GapsSnapshot,
    /// How often the thread that is followed was found on another core since the last look.
    moves: u32,
    /// Until when nobody runs after it.
    restless: Option<Instant>,
}

impl Watched {
    fn new(session: &Arc<Session>) -> Self {
        let mut tasks = session.pid().filter(|pid| *pid != std::process::id()).map(Tasks::new);
        // The first look only counts.
        tasks.as_mut().map(Tasks::look);
        Self { tasks, gaps: session.stats().gaps.snapshot(), moves: 0, restless: None }
    }
}

struct Round {
    scout: Arc<Scout>,
    shared: Weak<Shared>,
    watched: HashMap<u64, Watched>,
    /// How many faults each VM had had when it was last looked at, for each of the workers that serve it, and how many those are.
    counts: HashMap<u64, (u64, usize)>,
    /// Workers, by their numbers, that follow a thread of a session from core to core.
    follows: Vec<(usize, u64, u32)>,
    /// From one fault to the next, of the worker that had most since the last look.
    interval: Duration,
    looked: Instant,
}

impl Round {
    fn new(scout: Arc<Scout>, shared: Weak<Shared>) -> Self {
        Self {
            scout,
            shared,
            watched: HashMap::new(),
            counts: HashMap::new(),
            follows: Vec::new(),
            interval: Duration::ZERO,
            looked: Instant::now(),
        }
    }

    fn run(&mut self) {
        let mut deaf = DEAF;
        while self.wait_for_call() {
            let (mut idle, mut pause, mut lively) = (0, FIRST, false);
            self.count();
            let ((), mut owed) = with_rest(|| self.watch_caller());
            while idle < PATIENCE {
                if !self.rest(pause.max(owed)) {
                    return;
                }
                let Some(shared) = self.shared.upgrade() else { return };
                let (Seen { workers, changed }, rest) = with_rest(|| self.look(&shared));
                owed = rest;
                idle = if workers == 0 { idle + 1 } else { 0 };
                lively |= workers > 0;
                let longest = SELDOM.max(self.interval * WORTH_A_LOOK);
                pause = if changed || workers == 0 { SOON } else { (pause * 2).min(longest) };
            }
            self.follows.clear();
            self.watched.clear();
            self.counts.clear();
            deaf = if lively { DEAF } else { (deaf * 2).min(DEAF_AT_MOST) };
            std::thread::park_timeout(deaf.max(owed));
        }
    }

    /// Sleeps for so long, but for a glance now and then at threads that are followed. False once the pager ends.
    fn rest(&mut self, pause: Duration) -> bool {
        let mut left = pause;
        while !left.is_zero() {
            let glance = STEP.max(self.interval * WORTH_A_GLANCE);
            let step = if self.follows.is_empty() { left } else { left.min(glance) };
            std::thread::park_timeout(step);
            if self.scout.stop.load(Ordering::Acquire) {
                return false;
            }
            left -= step;
            if !left.is_zero() {
                let Some(shared) = self.shared.upgrade() else { return false };
                self.follow(&shared);
            }
        }
        true
    }

    fn follow(&mut self, shared: &Shared) {
        let workers = shared.workers.get().map_or(&[][..], Vec::as_slice);
        for at in 0..self.follows.len() {
            let (number, session, thread) = &self.follows[at].clone();
            let tasks = self.watched.get(session).and_then(|watched| watched.tasks.as_ref());
            let core = tasks.and_then(|tasks| tasks.core_of(*thread));
            if let Some(core) = core.filter(|core| self.scout.machine.may_use(*core)) {
                let moved = self.take(&workers[*number], Stance { on: On::Core(core), spin: Duration::ZERO });
                if let Some(watched) = self.watched.get_mut(session) {
                    watched.moves += u32::from(moved);
                }
            }
        }
    }

    /// Sleeps until a worker has something to show. False once the pager ends.
    fn wait_for_call(&self) -> bool {
        self.scout.listens.store(true, Ordering::Release);
        loop {
            if self.scout.stop.load(Ordering::Acquire) {
                return false;
            }
            if !self.scout.listens.load(Ordering::Acquire) {
                return true;
            }
            std::thread::park();
        }
    }

    /// Notes how many faults each VM has had.
    fn count(&mut self) {
        let Some(shared) = self.shared.upgrade() else { return };
        self.counts.clear();
        for session in shared.sessions().live.values() {
            // Faults of a session with shards are spread among its workers.
            let on = session.shards().min(shared.workers.get().map_or(1, Vec::len)).max(1);
            self.counts.insert(session.id(), (session.stats().counters.faults.get() / on as u64, on));
        }
        self.looked = Instant::now();
    }

    /// What its threads do from now on is seen at the first look.
    fn watch_caller(&mut self) {
        let id = self.scout.caller.load(Ordering::Relaxed);
        let caller = self.shared.upgrade().and_then(|shared| shared.sessions().live.get(&id).cloned());
        if let Some(session) = caller {
            self.watched.entry(id).or_insert_with(|| Watched::new(&session));
        }
    }

    fn look(&mut self, shared: &Shared) -> Seen {
        let before = std::mem::take(&mut self.counts);
        let elapsed = self.looked.elapsed();
        let least = LIVELY * elapsed.as_micros() as u64 / 1_000_000;
        self.interval = elapsed;
        self.count();
        let workers = shared.workers.get().map_or(&[][..], Vec::as_slice);
        let mut seen = Seen { workers: 0, changed: false };
        self.follows.clear();
        let mut stances = Vec::new();
        for (number, worker) in workers.iter().enumerate() {
            // As the pager deals them out: see `Shared::worker`.
            let mine = |id: u64, on: usize| {
                let first = id as usize % workers.len();
                (number + workers.len() - first) % workers.len() < on
            };
            let news =
                self.counts.iter().filter(|(id, (_, on))| mine(**id, *on)).map(|(id, (faults, _))| {
                    (faults - before.get(id).map_or(0, |was| was.0).min(*faults), *id)
                });
            let (mut all, mut most) = (0, (0, 0));
            for (faults, id) in news {
                all += faults;
                most = most.max((faults, id));
            }
            self.interval = self.interval.min(elapsed / all.clamp(1, u64::from(u32::MAX)) as u32);
            let lead = (all >= least.max(2) && is_most(most.0, all)).then_some(most.1);
            let stance = match lead.and_then(|id| shared.sessions().live.get(&id).cloned()) {
                None => Stance::BLOCK,
                Some(session) => {
                    seen.workers += 1;
                    // One look tells all its workers the same: what it has looked at is new once.
                    let known = stances.iter().find(|(id, _)| *id == session.id()).map(|(_, known)| *known);
                    let (stance, follows) = known.unwrap_or_else(|| self.stance(&session));
                    stances.push((session.id(), (stance, follows)));
                    self.follows.extend(follows.map(|thread| (number, session.id(), thread)));
                    stance
                }
            };
            seen.changed |= self.take(worker, stance);
        }
        seen
    }

    fn stance(&mut self, session: &Arc<Session>) -> (Stance, Option<u32>) {
        let placement = session.policy().placement;
        let machine = &self.scout.machine;
        let watched = self.watched.entry(session.id()).or_insert_with(|| Watched::new(session));
        let needs_look = !matches!(placement, Placement::Spin | Placement::Core(_));
        let look = watched.tasks.as_mut().filter(|_| needs_look).and_then(Tasks::look);
        let now = session.stats().gaps.snapshot();
        let gaps = now.since(&std::mem::replace(&mut watched.gaps, now));
        let look = look.filter(|look| look.threads() > 0);
        let now = Instant::now();
        if std::mem::take(&mut watched.moves) > STAYS {
            watched.restless = Some(now + RESTLESS);
        }
        let restless = watched.restless.is_some_and(|until| now < until);
        decide(placement, look.as_ref(), restless, &gaps, machine)
    }

    /// Has a worker take a stance. Whether it had another one.
    fn take(&self, worker: &Worker, stance: Stance) -> bool {
        let before = worker.stance();
        if before == stance {
            return false;
        }
        let machine = &self.scout.machine;
        let moved = match stance.on {
            // So that it may spin where it must not say where it runs.
            on if on == before.on => Ok(()),
            On::Any => worker.run_on(machine.allowed()),
            On::Node(node) => worker.run_on(machine.node(node)),
            On::Core(core) => worker.run_on(&[core].into_iter().collect()),
        };
        if moved.is_ok() {
            worker.set_stance(stance);
        } else {
            // A core that has just been taken away from us. The next look finds another; until then the worker must not stay on the one
            // before, which its stance would not say.
            let _ = worker.run_on(machine.allowed());
            worker.set_stance(Stance::BLOCK);
        }
        true
    }
}

/// Runs a look, and says how long a rest is owed after it.
fn with_rest<R>(look: impl FnOnce() -> R) -> (R, Duration) {
    let before = cpu_time();
    let seen = look();
    (seen, rest_after(cpu_time().saturating_sub(before)))
}

fn rest_after(took: Duration) -> Duration {
    if took > DEAR { took * REST } else { Duration::ZERO }
}

/// CPU of this thread so far: a look that had to wait for a core was not dear.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// What a look came to.
struct Seen {
    /// Workers that one VM keeps busy.
    workers: usize,
    /// Whether one of them took another stance.
    changed: bool,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sys::sched::Cores;

    #[test]
    fn a_dear_look_is_followed_by_a_rest_and_a_cheap_one_by_none() {
        assert_eq!(rest_after(Duration::from_micros(80)), Duration::ZERO);
        assert_eq!(rest_after(Duration::from_millis(10)), Duration::from_millis(320));
        let busy = || {
            let before = cpu_time();
            while cpu_time() - before <= DEAR {}
        };
        let ((), rest) = with_rest(busy);
        assert!(rest > DEAR * REST, "{rest:?}");
    }

    #[test]
    fn a_worker_whose_next_core_is_gone_does_not_stay_on_the_one_before() {
        let here: Vec<usize> = Cores::allowed().unwrap().iter().collect();
        let gone = Cores::MOST - 1;
        let machine = Machine::fake(&[&[&here[..], &[gone]].concat()], 0);
        let scout = Arc::new(Scout { machine, ..Scout::new() });
        let round = Round::new(Arc::clone(&scout), Weak::new());
        let (worker, thread) = Worker::start(0, Arc::clone(&scout), Box::new(|_| {})).unwrap();
        let runs_on = || worker.thread().unwrap().cores().unwrap().iter().collect::<Vec<_>>();
        let on = |core| Stance { on: On::Core(core), spin: Duration::ZERO };
        assert!(round.take(&worker, on(here[0])));
        assert_eq!(runs_on(), here[..1]);
        assert!(round.take(&worker, on(gone)));
        assert_eq!((worker.stance(), runs_on()), (Stance::BLOCK, here));
        worker.stop();
        thread.join().unwrap();
    }
}
