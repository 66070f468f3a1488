//! What a pager tells: a queue that can be polled, and a log of JSON lines. Both are the engine's own, so that a program that
//! embeds it, and is busy, loses no word of it.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::event::EventfdFlags;
use serde::Serialize;

/// Events kept for a reader that does not come: then the oldest go.
const KEPT: usize = 65_536;

/// Something that happened. Its JSON is flat: `event`, `at`, and the fields of [`What`].
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// When, in seconds since 1970.
    pub at: f64,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// What happened. `vm` is the VM's name, unique among the pager's sessions; addresses are the VMM's.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum What {
    /// VMs may connect.
    Listening {
        /// The path.
        socket: String,
        /// Where their memory comes from, in words.
        source: String,
        /// Bytes of the source.
        size: u64,
    },
    /// A VM has shaken hands and is served.
    SessionStarted {
        /// Its name.
        vm: String,
        /// Its process number, 0 where it cannot be seen from here.
        pid: u32,
        /// Of its handshake: `firecracker` or `latepage`.
        form: &'static str,
        /// What its memory is made of.
        backing: &'static str,
        /// Bytes of its memory.
        size: u64,
        /// How many vCPUs it says it has.
        vcpus: u32,
        /// Where its memory comes from, in words.
        source: String,
    },
    /// A peer is not served.
    Refused {
        /// Where it connected.
        socket: String,
        /// The name that it gave, if it had come that far.
        vm: Option<String>,
        /// Its process number, 0 where it cannot be seen from here.
        pid: u32,
        /// Its user.
        uid: u32,
        /// Why, and what to do.
        reason: String,
        /// What was done to it: `none`, `killed`, `poisoned`, or `held` and why.
        action: String,
    },
    /// A VM has all its memory, but for what could not be had.
    Populated {
        /// Its name.
        vm: String,
        /// Since its session began, in seconds.
        seconds: f64,
        /// Faults that it has had.
        faults: u64,
        /// Pages that could not be had.
        failed: u64,
    },
    /// A full VM was let go.
    Detached {
        /// Its name.
        vm: String,
    },
    /// A session is over, and nothing of it is left in the pager.
    Ended {
        /// Its name.
        vm: String,
        /// Why: `gone`, `detached` or `closed`.
        reason: &'static str,
        /// Since it began, in seconds.
        seconds: f64,
        /// Faults that it had.
        faults: u64,
        /// Pages that had not come.
        lacking: u64,
    },
    /// A page could not be had, and failed closed.
    Failed {
        /// Its name.
        vm: String,
        /// Where it was wanted.
        address: u64,
        /// The page, by its index in the session, where one is meant.
        page: Option<u32>,
        /// Why.
        reason: String,
        /// What was done about it: `killed`, `poisoned`, or `held` and why.
        action: String,
    },
    /// A fault is older than the limit.
    Stall {
        /// Its name.
        vm: String,
        /// Where the fault was.
        address: u64,
        /// How long it has waited, in seconds.
        age: f64,
    },
    /// Population met an error; faults go on being served.
    PopulationStopped {
        /// Its name.
        vm: String,
        /// Where it stopped.
        address: u64,
        /// Why.
        reason: String,
    },
    /// The machine has no page for a VM; it is tried again until it has.
    NoMemory {
        /// Its name.
        vm: String,
        /// The page that was to come.
        address: u64,
    },
    /// The VM did something that a pager cannot follow.
    Surprise {
        /// Its name.
        vm: String,
        /// What it did, in words.
        what: String,
    },
    /// The source is not what it was.
    SourceChanged {
        /// Which, in words.
        source: String,
        /// What is known of the change.
        change: String,
    },
    /// Someone wants to write the source, and is held back for a while.
    LeaseBreaking {
        /// Which, in words.
        source: String,
        /// How long the writer is held back at most.
        seconds: f64,
        /// What is known of it, in words.
        change: String,
    },
    /// The pager cannot do something that it may need.
    Warning {
        /// What, and what to do.
        what: String,
    },
    /// No new VM is taken.
    Draining {
        /// VMs that are served now.
        vms: usize,
    },
    /// The drain waits for this VM.
    WaitingFor {
        /// Its name.
        vm: String,
        /// Why it cannot be let go.
        reason: &'static str,
    },
    /// Every VM has ended or was let go.
    Drained,
    /// The pager ends and this VM lives: it waits for ever at its next fault or discard, until someone ends it.
    Left {
        /// Its name.
        vm: String,
        /// Pages that had not come.
        lacking: u64,
    },
    /// Events were dropped, since nobody read them.
    Lost {
        /// How many.
        count: u64,
    },
}

impl What {
    /// What the log calls it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Listening { .. } => "listening",
            Self::SessionStarted { .. } => "session-started",
            Self::Refused { .. } => "refused",
            Self::Populated { .. } => "populated",
            Self::Detached { .. } => "detached",
            Self::Ended { .. } => "ended",
            Self::Failed { .. } => "failed",
            Self::Stall { .. } => "stall",
            Self::PopulationStopped { .. } => "population-stopped",
            Self::NoMemory { .. } => "no-memory",
            Self::Surprise { .. } => "surprise",
            Self::SourceChanged { .. } => "source-changed",
            Self::LeaseBreaking { .. } => "lease-breaking",
            Self::Warning { .. } => "warning",
            Self::Draining { .. } => "draining",
            Self::WaitingFor { .. } => "waiting-for",
            Self::Drained => "drained",
            Self::Left { .. } => "left",
            Self::Lost { .. } => "lost",
        }
    }
}

struct Queue {
    events: VecDeque<Event>,
    lost: u64,
    /// How many of each kind there have been.
    told: BTreeMap<&'static str, u64>,
}

/// The events of a pager.
pub struct Events {
    queue: Mutex<Queue>,
    /// Readable while events wait.
    readable: OwnedFd,
    log: Mutex<Option<Log>>,
}

struct Log {
    lines: Sender<Event>,
    writer: JoinHandle<()>,
}

impl Events {
    /// A queue, and a log of JSON lines to `log` if one is given. A thread of its own writes it: a reader of the log that does
    /// not read holds nobody up.
    ///
    /// # Errors
    /// What eventfd(2) or the start of the thread said.
    pub(super) fn new(log: Option<OwnedFd>) -> std::io::Result<Self> {
        let readable = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let log = match log {
            None => None,
            Some(descriptor) => {
                let (lines, received) = mpsc::channel::<Event>();
                let mut file = File::from(descriptor);
                let writer =
                    std::thread::Builder::new().name("latepage-log".to_owned()).spawn(move || {
                        for event in received {
                            let Ok(mut line) = serde_json::to_vec(&event) else { continue };
                            line.push(b'\n');
                            if file.write_all(&line).is_err() {
                                // Nobody reads the log any more. The queue still has every event.
                                return;
                            }
                        }
                    })?;
                Some(Log { lines, writer })
            }
        };
        Ok(Self {
            queue: Mutex::new(Queue { events: VecDeque::new(), lost: 0, told: BTreeMap::new() }),
            readable,
            log: Mutex::new(log),
        })
    }

    pub(super) fn emit(&self, what: What) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let event = Event { at, what };
        if let Some(log) = &*self.log.lock().unwrap_or_else(PoisonError::into_inner) {
            // It fails once the writer has given up, which it does when nobody reads.
            let _ = log.lines.send(event.clone());
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.events.len() == KEPT {
            queue.events.pop_front();
            queue.lost += 1;
        }
        *queue.told.entry(event.what.name()).or_default() += 1;
        queue.events.push_back(event);
        // It only fails when it is readable anyway.
        let _ = rustix::io::write(&self.readable, &1u64.to_ne_bytes());
    }

    /// Takes up to `limit` events, oldest first.
    pub fn take(&self, limit: usize) -> Vec<Event> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = Vec::new();
        if queue.lost > 0
            && let Some(oldest) = queue.events.front()
        {
            taken.push(Event { at: oldest.at, what: What::Lost { count: queue.lost } });
            queue.lost = 0;
        }
        let count = limit.saturating_sub(taken.len()).min(queue.events.len());
        taken.extend(queue.events.drain(..count));
        if queue.events.is_empty() {
            let _ = rustix::io::read(&self.readable, &mut [0; 8]);
        }
        taken
    }

    /// How many events of each kind there have been, read or not; kinds of which there were none are missing.
    pub fn told(&self) -> BTreeMap<&'static str, u64> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).told.clone()
    }

    /// A descriptor that polls readable while events wait.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.readable.as_fd()
    }

    /// Writes what is left to the log and ends its thread.
    pub(super) fn close(&self) {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Log { lines, writer }) = log {
            drop(lines);
            let _ = writer.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_is_counted_by_the_name_that_the_log_has() {
        let events = Events::new(None).unwrap();
        let all = [
            What::Refused {
                socket: String::new(),
                vm: None,
                pid: 1,
                uid: 0,
                reason: String::new(),
                action: String::new(),
            },
            What::Detached { vm: String::new() },
            What::PopulationStopped { vm: String::new(), address: 0, reason: String::new() },
            What::Drained,
            What::Drained,
        ];
        for what in all {
            let line = serde_json::to_value(&what).unwrap();
            assert_eq!(line["event"], what.name());
            events.emit(what);
        }
        let told: Vec<_> = events.told().into_iter().collect();
        assert_eq!(told, [("detached", 1), ("drained", 2), ("population-stopped", 1), ("refused", 1)]);
    }
}
