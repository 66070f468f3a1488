//! What waits, what is under way, and what was given up. No clock and no lock of its own: the caller has both.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use super::{Call, Contents, Terms, WrongLength};

/// A request, as a thread of a pager makes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) view: u64,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) unit: u64,
    /// Nobody waits for it yet.
    pub(super) ahead: bool,
}

/// A request's part of what a call was answered with.
#[derive(Debug, Clone)]
pub(super) enum Piece {
    Zero,
    /// From this byte on.
    Bytes(Arc<Vec<u8>>, usize),
}

/// Contents, or why there are none; and how many bytes were asked for in the end.
pub(super) type Outcome = Result<(Piece, u64), (String, u64)>;

/// How long whoever made a request has to wait.
pub(super) enum Until {
    /// No longer. The request is forgotten.
    Done(Outcome),
    /// Something has just changed: look again.
    Again,
    /// Until it is called.
    Called(Arc<Condvar>),
    /// Until it is called, or then.
    CalledOr(Arc<Condvar>, Instant),
}

#[derive(Debug)]
struct Request {
    asked: Asked,
    /// It was part of a call that failed: from now on it is asked for by itself.
    alone: bool,
    at: At,
    signal: Arc<Condvar>,
}

#[derive(Debug)]
enum At {
    Waiting,
    /// Part of that call.
    Running(u64),
    Done(Outcome),
}

impl Request {
    fn end(&self) -> u64 {
        self.asked.offset + self.asked.length
    }

    fn finish(&mut self, outcome: Result<Piece, String>) {
        let length = self.asked.length;
        self.at = At::Done(outcome.map(|piece| (piece, length)).map_err(|reason| (reason, length)));
        self.signal.notify_one();
    }
}

/// A call under way.
#[derive(Debug)]
struct Running {
    offset: u64,
    length: u64,
    ahead: bool,
    since: Instant,
    requests: Vec<u64>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    views: BTreeSet<u64>,
    pub(super) holds: usize,
    pub(super) retired: bool,
    /// Threads that call `take`, or are under way with a call.
    pub(super) takers: usize,
    next: u64,
    requests: BTreeMap<u64, Request>,
    demand: VecDeque<u64>,
    ahead: VecDeque<u64>,
    running: BTreeMap<u64, Running>,
    /// Calls that nobody waits for any more, and when each began: their threads have not come back.
    abandoned: BTreeMap<u64, Instant>,
}

impl State {
    pub(super) fn is_open(&self) -> bool {
        !self.retired && (self.holds > 0 || !self.views.is_empty())
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(super) fn open_view(&mut self) -> u64 {
        let view = self.number();
        self.views.insert(view);
        view
    }

    /// Whoever waits by this view is told so; what nobody else waits for is forgotten.
    pub(super) fn close_view(&mut self, view: u64) {
        if !self.views.remove(&view) {
            return;
        }
        for request in self.requests.values_mut().filter(|request| request.asked.view == view) {
            if !matches!(request.at, At::Done(_)) {
                request.finish(Err(CLOSED.to_owned()));
            }
        }
        let requests = &self.requests;
        let wanted = |id: &u64| requests.get(id).is_some_and(|request| !matches!(request.at, At::Done(_)));
        self.demand.retain(wanted);
        self.ahead.retain(wanted);
        let abandoned = &mut self.abandoned;
        self.running.retain(|id, call| {
            call.requests.retain(wanted);
            if call.requests.is_empty() {
                abandoned.insert(*id, call.since);
            }
            !call.requests.is_empty()
        });
    }

    /// Whether no thread is left that could answer: each is under way with a call that is past its limit.
    fn all_hang(&self, limit: Option<Duration>, now: Instant) -> bool {
        let Some(limit) = limit else { return false };
        let hung = |since: &&Instant| now.saturating_duration_since(**since) >= limit;
        self.takers > 0 && self.abandoned.values().filter(hung).count() >= self.takers
    }

    /// Puts a request in the queue, or joins it to a call that is under way for the same pages.
    pub(super) fn submit(&mut self, asked: Asked, terms: &Terms, now: Instant) -> Result<u64, String> {
        if !self.views.contains(&asked.view) {
            return Err(CLOSED.to_owned());
        }
        if self.all_hang(terms.limit, now) {
            return Err(self.hang_text(terms));
        }
        let id = self.number();
        let mut request = Request { asked, alone: false, at: At::Waiting, signal: Arc::new(Condvar::new()) };
        let covers = |call: &&mut Running| {
            call.ahead == asked.ahead
                && call.offset <= asked.offset
                && call.offset + call.length >= asked.offset + asked.unit
        };
        let calls = self.running.iter_mut();
        if let Some((call, running)) = calls.map(|(id, call)| (*id, call)).find(|(_, call)| covers(call)) {
            let covered = running.offset + running.length - asked.offset;
            request.asked.length = asked.length.min(covered) / asked.unit * asked.unit;
            request.at = At::Running(call);
            running.requests.push(id);
        } else if asked.ahead {
            self.ahead.push_back(id);
        } else {
            self.demand.push_back(id);
        }
        self.requests.insert(id, request);
        Ok(id)
    }

    /// What whoever made a request is to do now.
    pub(super) fn look(&mut self, id: u64, terms: &Terms, now: Instant) -> Until {
        let request = self.requests.get(&id).expect("a request is forgotten by the one who made it");
        let signal = Arc::clone(&request.signal);
        match &request.at {
            At::Done(_) => {
                let Some(Request { at: At::Done(outcome), .. }) = self.requests.remove(&id) else {
                    unreachable!("it was looked at above")
                };
                Until::Done(outcome)
            }
            At::Running(call) => {
                let (call, since) = (*call, self.running.get(call).map_or(now, |call| call.since));
                match terms.limit.map(|limit| (since.checked_add(limit), limit)) {
                    Some((Some(deadline), limit)) if deadline <= now => {
                        self.expire(call, limit, terms, now);
                        Until::Again
                    }
                    Some((Some(deadline), _)) => Until::CalledOr(signal, deadline),
                    _ => Until::Called(signal),
                }
            }
            At::Waiting if self.all_hang(terms.limit, now) => {
                self.fail_waiting(terms);
                Until::Again
            }
            // It may have been taken by then.
            At::Waiting => match terms.limit.and_then(|limit| now.checked_add(limit)) {
                Some(then) => Until::CalledOr(signal, then),
                None => Until::Called(signal),
            },
        }
    }

    /// A call is past its limit: who waits for it fails, and its thread is not counted on any more.
    fn expire(&mut self, id: u64, limit: Duration, terms: &Terms, now: Instant) {
        let Some(call) = self.running.remove(&id) else { return };
        self.abandoned.insert(id, call.since);
        let reason = format!("it has not answered within its time limit of {} s", limit.as_secs_f64());
        for request in call.requests {
            self.finish(request, Err(reason.clone()));
        }
        if self.all_hang(terms.limit, now) {
            self.fail_waiting(terms);
        }
    }

    fn fail_waiting(&mut self, terms: &Terms) {
        let reason = self.hang_text(terms);
        let waiting: Vec<u64> = self.demand.drain(..).chain(self.ahead.drain(..)).collect();
        for request in waiting {
            self.finish(request, Err(reason.clone()));
        }
    }

    fn hang_text(&self, terms: &Terms) -> String {
        let limit = terms.limit.unwrap_or_default().as_secs_f64();
        format!("all of its {} threads hang: none came back within its time limit of {limit} s", self.takers)
    }

    fn finish(&mut self, request: u64, outcome: Result<Piece, String>) {
        if let Some(request) = self.requests.get_mut(&request) {
            request.finish(outcome);
        }
    }

    /// The next call, if one may begin. Population leaves one thread free for faults, where there are two.
    pub(super) fn begin(&mut self, terms: &Terms, now: Instant) -> Option<Call> {
        if self.running.len() >= terms.threads {
            return None;
        }
        let populating = self.running.values().filter(|call| call.ahead).count();
        let ahead = self.demand.is_empty();
        if ahead && terms.threads > 1 && populating >= terms.threads - 1 {
            return None;
        }
        let queue = if ahead { &mut self.ahead } else { &mut self.demand };
        let first = queue.pop_front()?;
        let request = &self.requests[&first];
        let (mut start, mut end, alone) = (request.asked.offset, request.end(), request.alone);
        let mut requests = vec![first];
        let most = terms.batch.max(end - start);
        let joins = |id: &u64, start: u64, end: u64| {
            let other = &self.requests[id];
            let (from, to) = (other.asked.offset.min(start), other.end().max(end));
            !other.alone && other.asked.offset <= end && other.end() >= start && to - from <= most
        };
        while !alone && let Some(at) = queue.iter().position(|id| joins(id, start, end)) {
            let id = queue.remove(at).expect("it was found there");
            (start, end) = (start.min(self.requests[&id].asked.offset), end.max(self.requests[&id].end()));
            requests.push(id);
        }
        let id = self.number();
        for request in &requests {
            if let Some(request) = self.requests.get_mut(request) {
                request.at = At::Running(id);
            }
        }
        self.running.insert(id, Running { offset: start, length: end - start, ahead, since: now, requests });
        Some(Call { id, offset: start, length: end - start })
    }

    pub(super) fn answer(&mut self, id: u64, contents: Contents) -> Result<bool, WrongLength> {
        let Some(call) = self.running.get(&id) else {
            self.abandoned.remove(&id);
            return Ok(false);
        };
        if let Contents::Bytes(bytes) = &contents
            && bytes.len() as u64 != call.length
        {
            return Err(WrongLength { returned: bytes.len() as u64, asked: call.length });
        }
        let (call, bytes) = match (self.running.remove(&id), contents) {
            (Some(call), Contents::Bytes(bytes)) => (call, Some(Arc::new(bytes))),
            (Some(call), Contents::Zero) => (call, None),
            (None, _) => unreachable!("it was looked at above"),
        };
        for id in call.requests {
            let Some(request) = self.requests.get_mut(&id) else { continue };
            let start = (request.asked.offset - call.offset) as usize;
            let piece = bytes.as_ref().map_or(Piece::Zero, |bytes| Piece::Bytes(Arc::clone(bytes), start));
            request.finish(Ok(piece));
        }
        Ok(true)
    }

    pub(super) fn fail(&mut self, id: u64, reason: &str) -> bool {
        let Some(call) = self.running.remove(&id) else {
            self.abandoned.remove(&id);
            return false;
        };
        for id in call.requests.into_iter().rev() {
            let Some(request) = self.requests.get_mut(&id) else { continue };
            let Asked { offset, length, unit, ahead, .. } = request.asked;
            if length == unit && (call.offset, call.length) == (offset, length) {
                request.finish(Err(reason.to_owned()));
                continue;
            }
            // The fault needs its first page only. Population looks for the page that fails by halves.
            request.asked.length = if ahead { (length / 2 / unit * unit).max(unit) } else { unit };
            request.alone = true;
            request.at = At::Waiting;
            if ahead { self.ahead.push_front(id) } else { self.demand.push_front(id) }
        }
        true
    }
}

const CLOSED: &str = "the pager that asked for it has ended";
