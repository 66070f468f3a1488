//! Threads that may block: they read what a source does not have at hand, and populate.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::follow::Plan;
use crate::session::{LetGo, Scratch, Session, Sliced};

/// How long to wait after the kernel refused a call for now.
const REFUSED: Duration = Duration::from_millis(1);
/// How long population waits where there was no memory for a page.
const STARVED: Duration = Duration::from_millis(100);
/// How long population waits before it walks again for what it passed over: pages that were in flight just then, and given back.
const PASSED_OVER: Duration = Duration::from_millis(250);

/// Something to do that may take long.
pub(super) enum Job {
    /// A page that is in flight.
    Read(Arc<Session>, u32),
    /// Ranges of pages that are to come before anyone asks.
    Populate(Arc<Session>, VecDeque<Range<u32>>),
    /// All that a session is owed, from this page on; and again from the first, until nothing is owed.
    PopulateAll(Arc<Session>, u32),
    /// What a program said is to come next, and goes on saying.
    Follow(Arc<Session>, Arc<Plan>),
    /// A full session may go.
    Detach(Arc<Session>),
}

struct State {
    jobs: VecDeque<Job>,
    later: Vec<(Instant, Job)>,
    stop: bool,
}

/// A queue of jobs and its threads.
pub(super) struct Pool {
    state: Mutex<State>,
    more: Condvar,
}

/// Pools, and the threads of all of them.
pub(super) type Started<const N: usize> = ([Arc<Pool>; N], Vec<JoinHandle<()>>);

/// A pool for each name, with so many threads, and the threads of all. Where one cannot be started, none is.
pub(super) fn start_all<const N: usize>(wanted: [(&str, usize); N]) -> std::io::Result<Started<N>> {
    let (mut pools, mut threads) = (Vec::new(), Vec::new());
    for (name, count) in wanted {
        match Pool::start(name, count) {
            Ok((pool, started)) => {
                pools.push(pool);
                threads.extend(started);
            }
            Err(error) => {
                pools.iter().for_each(|pool: &Arc<Pool>| pool.stop());
                return Err(error);
            }
        }
    }
    let pools = pools.try_into().unwrap_or_else(|_| unreachable!("one for each that was wanted"));
    Ok((pools, threads))
}

impl Pool {
    pub(super) fn start(name: &str, threads: usize) -> std::io::Result<(Arc<Self>, Vec<JoinHandle<()>>)> {
        let state = State { jobs: VecDeque::new(), later: Vec::new(), stop: false };
        let pool = Arc::new(Self { state: Mutex::new(state), more: Condvar::new() });
        let handles = (0..threads.max(1))
            .map(|number| {
                let pool = Arc::clone(&pool);
                std::thread::Builder::new().name(format!("latepage-{name}{number}")).spawn(move || pool.run())
            })
            .collect::<Result<_, _>>();
        match handles {
            Ok(handles) => Ok((pool, handles)),
            Err(error) => {
                pool.stop();
                Err(error)
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn submit(&self, job: Job) {
        let mut state = self.state();
        if !state.stop {
            state.jobs.push_back(job);
        }
        drop(state);
        self.more.notify_one();
    }

    /// For what cannot be done just now.
    fn submit_later(&self, job: Job, pause: Duration) {
        let mut state = self.state();
        if !state.stop {
            state.later.push((Instant::now() + pause, job));
        }
        drop(state);
        self.more.notify_one();
    }

    /// Ends the threads. What was not done is dropped: its sessions hold whoever holds this pool.
    pub(super) fn stop(&self) {
        let mut state = self.state();
        state.stop = true;
        let undone = (std::mem::take(&mut state.jobs), std::mem::take(&mut state.later));
        drop(state);
        drop(undone);
        self.more.notify_all();
    }

    fn run(&self) {
        let mut scratch = Scratch::new();
        while let Some(job) = self.next() {
            match job {
                // A VM that has gone meanwhile waits for nothing.
                Job::Read(session, _) if session.end().is_some() => {}
                Job::Read(session, page) => session.finish_read(page, &mut scratch),
                Job::Detach(session) => {
                    if session.detach(&mut scratch) == LetGo::NotYet {
                        self.submit_later(Job::Detach(session), REFUSED);
                    }
                }
                Job::Populate(session, ranges) => self.populate(session, ranges, &mut scratch),
                Job::PopulateAll(session, from) => self.populate_all(session, from, &mut scratch),
                Job::Follow(session, plan) => self.follow(session, plan, &mut scratch),
            }
        }
    }

    /// One step, then back to the end of the queue: sessions take turns.
    fn populate(&self, session: Arc<Session>, mut ranges: VecDeque<Range<u32>>, scratch: &mut Scratch) {
        let Some(range) = ranges.front_mut() else { return };
        match session.populate(range, scratch) {
            Sliced::More => self.submit(Job::Populate(session, ranges)),
            Sliced::Done => {
                ranges.pop_front();
                if !ranges.is_empty() {
                    self.submit(Job::Populate(session, ranges));
                }
            }
            Sliced::Wait => self.submit_later(Job::Populate(session, ranges), REFUSED),
            Sliced::Starved => self.submit_later(Job::Populate(session, ranges), STARVED),
            Sliced::Stopped => {}
        }
    }

    fn follow(&self, session: Arc<Session>, plan: Arc<Plan>, scratch: &mut Scratch) {
        let Some((number, mut range)) = plan.take() else { return };
        match session.populate(&mut range, scratch) {
            Sliced::Done => self.submit(Job::Follow(session, plan)),
            Sliced::Stopped => plan.stop(),
            more => {
                plan.put_back(number, range);
                match more {
                    Sliced::Wait => self.submit_later(Job::Follow(session, plan), REFUSED),
                    Sliced::Starved => self.submit_later(Job::Follow(session, plan), STARVED),
                    _ => self.submit(Job::Follow(session, plan)),
                }
            }
        }
    }

    fn populate_all(&self, session: Arc<Session>, from: u32, scratch: &mut Scratch) {
        let mut left = from..session.layout().pages();
        match session.populate(&mut left, scratch) {
            Sliced::More => self.submit(Job::PopulateAll(session, left.start)),
            Sliced::Wait => self.submit_later(Job::PopulateAll(session, left.start), REFUSED),
            // The page is laid aside for the next walk: of a huge page the kernel does not say whether it lacks memory or is
            // there already, and the others need not wait for that.
            Sliced::Starved => self.submit_later(Job::PopulateAll(session, left.start + 1), STARVED),
            Sliced::Done if session.owed() > 0 && session.end().is_none() => {
                self.submit_later(Job::PopulateAll(session, 0), PASSED_OVER);
            }
            Sliced::Done | Sliced::Stopped => {}
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if state.stop {
                return None;
            }
            let now = Instant::now();
            let due = state.later.iter().position(|(due, _)| *due <= now);
            let job = match due {
                Some(at) => Some(state.later.swap_remove(at).1),
                None => state.jobs.pop_front(),
            };
            if job.is_some() {
                // Whoever was the one to look at the clock is busy from here on: another takes that on.
                if !(state.jobs.is_empty() && state.later.is_empty()) {
                    self.more.notify_one();
                }
                return job;
            }
            state = match state.later.iter().map(|(due, _)| *due).min() {
                None => self.more.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(due) => {
                    let left = due.saturating_duration_since(now);
                    self.more.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}
