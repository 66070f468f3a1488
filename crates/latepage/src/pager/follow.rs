//! What VMs touch, told in batches to a program that says what is to come next; and what it said, until it has come.
//!
//! The program asks on a thread of its own. It is woken by the attendant, which looks at the trace rings as it goes by: nothing
//! is done for this on the path of a fault, and an idle VM costs a look a second.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::session::Session;
use crate::stats::{Reason, TraceEntry};

/// What a VM has touched since it was last told of.
#[derive(Debug)]
pub struct Touched {
    /// The VM.
    pub session: Arc<Session>,
    /// Pages that a fault asked for, oldest first. None at all in the first batch of a VM, which says that it has started.
    pub entries: Vec<TraceEntry>,
}

/// The VMs of a socket whose population a program directs. Their policy must keep a trace.
#[derive(Debug, Default)]
pub struct Following {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct State {
    vms: VecDeque<Vm>,
    over: bool,
}

#[derive(Debug)]
struct Vm {
    session: Arc<Session>,
    plan: Arc<Plan>,
    /// That it has started was told.
    told: bool,
    /// Its ring has grown since it was read.
    grown: bool,
    cursor: u64,
}

impl Vm {
    fn news(&mut self) -> Option<Touched> {
        let mut entries = Vec::new();
        if std::mem::replace(&mut self.told, true) {
            if !std::mem::take(&mut self.grown) {
                return None;
            }
            let read = self.session.stats().trace.read_from(self.cursor);
            self.cursor = read.cursor;
            let touched = |entry: &TraceEntry| matches!(entry.reason, Reason::Demand | Reason::Cleared);
            entries.extend(read.entries.into_iter().filter(touched));
            if entries.is_empty() {
                return None;
            }
        }
        Some(Touched { session: Arc::clone(&self.session), entries })
    }
}

impl Following {
    /// Of no VM yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a VM has started, or has touched something since it was last told of; VMs take turns. `None`: it is over.
    pub fn next(&self) -> Option<Touched> {
        let mut state = self.state();
        loop {
            if state.over {
                return None;
            }
            for _ in 0..state.vms.len() {
                let Some(mut vm) = state.vms.pop_front() else { break };
                if vm.session.end().is_some() {
                    continue;
                }
                let news = vm.news();
                state.vms.push_back(vm);
                if news.is_some() {
                    return news;
                }
            }
            state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Tells of this VM no more.
    pub fn dismiss(&self, session: &Session) {
        self.state().vms.retain(|vm| vm.session.id() != session.id());
    }

    /// Ends it: whoever waits is told so. A pager does this when it is closed.
    pub fn end(&self) {
        let vms = {
            let mut state = self.state();
            state.over = true;
            std::mem::take(&mut state.vms)
        };
        self.more.notify_all();
        drop(vms);
    }

    pub(super) fn adopt(&self, session: Arc<Session>) {
        let vm = Vm { session, plan: Arc::default(), told: false, grown: false, cursor: 0 };
        let mut state = self.state();
        if !state.over {
            state.vms.push_back(vm);
        }
        drop(state);
        self.more.notify_one();
    }

    /// Looks whether there is something to tell. Returns whether there is, so that the next look should come soon.
    pub(super) fn look(&self) -> bool {
        let mut state = self.state();
        state.vms.retain(|vm| vm.session.end().is_none());
        let mut any = false;
        for vm in &mut state.vms {
            vm.grown = vm.session.stats().trace.recorded() > vm.cursor;
            any |= vm.grown;
        }
        drop(state);
        if any {
            self.more.notify_one();
        }
        any
    }

    /// What was said of this VM; `None` if it is not, or no longer, followed.
    pub(super) fn plan(&self, session: &Session) -> Option<Arc<Plan>> {
        let state = self.state();
        state.vms.iter().find(|vm| vm.session.id() == session.id()).map(|vm| Arc::clone(&vm.plan))
    }
}

/// Ranges of pages that are to come, the newest first. What has come meanwhile costs a look at its states.
#[derive(Debug, Default)]
pub(super) struct Plan(Mutex<Planned>);

/// What was said at one time. More than this is not remembered: the oldest goes.
const BATCHES: usize = 64;

#[derive(Debug, Default)]
struct Planned {
    batches: VecDeque<(u64, VecDeque<Range<u32>>)>,
    next: u64,
    /// A job of the pool follows it.
    under_way: bool,
    /// The source failed: nothing is populated any more.
    stopped: bool,
}

impl Plan {
    fn planned(&self) -> MutexGuard<'_, Planned> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts ranges before all that was said earlier. Returns whether somebody must now be found who follows the plan.
    pub(super) fn add(&self, ranges: VecDeque<Range<u32>>) -> bool {
        let mut planned = self.planned();
        if planned.stopped || ranges.is_empty() {
            return false;
        }
        planned.next += 1;
        let number = planned.next;
        planned.batches.push_back((number, ranges));
        if planned.batches.len() > BATCHES {
            planned.batches.pop_front();
        }
        !std::mem::replace(&mut planned.under_way, true)
    }

    /// The next range, and whose it is; `None` when there is none, and whoever follows the plan may go.
    pub(super) fn take(&self) -> Option<(u64, Range<u32>)> {
        let mut planned = self.planned();
        while let Some((number, ranges)) = planned.batches.back_mut() {
            if let Some(range) = ranges.pop_front() {
                return Some((*number, range));
            }
            planned.batches.pop_back();
        }
        planned.under_way = false;
        None
    }

    /// Puts back what is left of a range.
    pub(super) fn put_back(&self, number: u64, left: Range<u32>) {
        let mut planned = self.planned();
        if let Some((_, ranges)) = planned.batches.iter_mut().find(|(known, _)| *known == number) {
            ranges.push_front(left);
        }
    }

    pub(super) fn stop(&self) {
        let mut planned = self.planned();
        planned.stopped = true;
        planned.batches.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "lists of ranges")]
    fn what_was_said_last_comes_first_and_what_was_begun_goes_on_behind_it() {
        let plan = Plan::default();
        assert!(plan.add([0..10, 20..30].into()), "somebody must follow it");
        assert!(!plan.add(VecDeque::new()));
        let (number, first) = plan.take().unwrap();
        assert_eq!(first, 0..10);
        assert!(!plan.add([50..60].into()), "somebody does");
        plan.put_back(number, 4..10);
        let order: Vec<_> = std::iter::from_fn(|| plan.take().map(|(_, range)| range)).collect();
        assert_eq!(order, [50..60, 4..10, 20..30]);
        assert!(plan.add([70..80].into()), "nobody does any more");
        plan.stop();
        assert_eq!(plan.take(), None);
        assert!(!plan.add([80..90].into()));
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "lists of ranges")]
    fn a_plan_does_not_grow_without_end() {
        let plan = Plan::default();
        for page in 0..1000 {
            plan.add([page..page + 1].into());
        }
        let order: Vec<_> = std::iter::from_fn(|| plan.take().map(|(_, range)| range.start)).collect();
        assert_eq!(order, (1000 - BATCHES as u32..1000).rev().collect::<Vec<_>>());
    }

    #[test]
    fn whoever_waits_is_told_that_it_is_over() {
        let following = Following::new();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| following.next().is_none());
            following.end();
            assert!(waiting.join().unwrap());
        });
    }
}
