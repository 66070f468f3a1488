//! Threads that may block: they read what a source does not have at hand, and populate.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::session::{LetGo, Scratch, Session, Sliced};

/// How long population waits after the kernel refused an install.
const REFUSED: Duration = Duration::from_millis(1);

/// Something to do that may take long.
pub(super) enum Job {
    /// A page that is in flight.
    Read(Arc<Session>, u32),
    /// Ranges of pages that are to come before anyone asks, and whether to try again what is left when they have been walked.
    Populate(Arc<Session>, VecDeque<Range<u32>>),
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

impl Pool {
    pub(super) fn start(
        name: &'static str,
        threads: usize,
    ) -> std::io::Result<(Arc<Self>, Vec<JoinHandle<()>>)> {
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

    /// For what the kernel refused just now.
    fn submit_later(&self, job: Job) {
        let mut state = self.state();
        if !state.stop {
            state.later.push((Instant::now() + REFUSED, job));
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
                Job::Read(session, page) => session.finish_read(page, &mut scratch),
                Job::Detach(session) => {
                    if session.detach(&mut scratch) == LetGo::NotYet {
                        self.submit_later(Job::Detach(session));
                    }
                }
                Job::Populate(session, ranges) => self.populate(session, ranges, &mut scratch),
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
            Sliced::Wait => self.submit_later(Job::Populate(session, ranges)),
            Sliced::Stopped => {}
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if state.stop {
                return None;
            }
            let now = Instant::now();
            if let Some(at) = state.later.iter().position(|(due, _)| *due <= now) {
                return Some(state.later.swap_remove(at).1);
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
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
