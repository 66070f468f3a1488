//! What a VM tells whoever runs it, as it happens.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use serde::Serialize;

use crate::error::VmError;
use crate::job::JobReport;

/// Something happened. Times are nanoseconds of CLOCK_MONOTONIC since the VM began to be created or restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The guest ran its first instruction.
    FirstInstruction {
        /// When.
        ns: u64,
    },
    /// A job has come that far.
    Progress {
        /// Pages done.
        done: u64,
        /// Pages in all.
        pages: u64,
        /// When.
        ns: u64,
    },
    /// A page is not what it should be; at most [`WRONG_LISTED`](crate::job::WRONG_LISTED) for a job.
    WrongPage {
        /// Its number.
        page: u64,
        /// When.
        ns: u64,
    },
    /// A job is over.
    JobDone {
        /// What came of it.
        report: JobReport,
    },
    /// The pager closed its end of the handshake's socket.
    PagerGone {
        /// What it said before that, if anything.
        said: String,
        /// When.
        ns: u64,
    },
    /// Another pager listened at that socket's path, and was handed the VM (the delivery `notify`).
    PagerBack {
        /// When.
        ns: u64,
    },
    /// The VM cannot go on.
    Failed {
        /// Why.
        error: String,
        /// When.
        ns: u64,
    },
    /// Somebody asked the VM to end.
    Quit,
}

/// Events that wait to be taken, and a descriptor that is readable while there are any.
#[derive(Debug)]
pub(crate) struct Events {
    waiting: Mutex<VecDeque<Event>>,
    arrived: Condvar,
    signal: OwnedFd,
}

/// Events kept for a reader who does not come; the oldest go first.
const KEPT: usize = 10_000;

impl Events {
    pub(crate) fn new() -> Result<Self, VmError> {
        let signal = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| VmError::call("eventfd", errno))?;
        Ok(Self { waiting: Mutex::default(), arrived: Condvar::new(), signal })
    }

    pub(crate) fn push(&self, event: Event) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() == KEPT {
            waiting.pop_front();
        }
        waiting.push_back(event);
        // The counter cannot overflow by ones, and a full one would be readable anyway.
        let _ = rustix::io::write(&self.signal, &1u64.to_ne_bytes());
        self.arrived.notify_all();
    }

    /// The next event, if one is there or comes within `timeout` (for ever if there is none).
    pub(crate) fn take(&self, timeout: Option<Duration>) -> Option<Event> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(event) = waiting.pop_front() {
                if waiting.is_empty() {
                    let _ = rustix::io::read(&self.signal, &mut [0; 8]);
                }
                return Some(event);
            }
            waiting = match deadline {
                None => self.arrived.wait(waiting).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left =
                        deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
                    self.arrived.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    #[test]
    fn the_descriptor_is_readable_exactly_while_events_wait() {
        let events = Events::new().unwrap();
        let readable = || {
            let mut set = [PollFd::new(&events.signal, PollFlags::IN)];
            poll(&mut set, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
        };
        assert!(!readable());
        events.push(Event::Quit);
        events.push(Event::Quit);
        assert!(readable());
        assert_eq!(events.take(None), Some(Event::Quit));
        assert!(readable());
        assert_eq!(events.take(None), Some(Event::Quit));
        assert!(!readable());
        assert_eq!(events.take(Some(Duration::ZERO)), None);
    }
}
