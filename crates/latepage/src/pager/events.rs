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
#[allow(missing_docs, reason = "the fields say what they are; docs/pager.md describes each event")]
pub enum What {
    /// VMs may connect.
    Listening { socket: String, source: String, size: u64 },
    /// A VM has shaken hands and is served. `size` is bytes of memory.
    SessionStarted {
        vm: String,
        pid: u32,
        form: &'static str,
        backing: &'static str,
        size: u64,
        vcpus: u32,
        source: String,
    },
    /// A peer is not served.
    Refused { socket: String, vm: Option<String>, pid: u32, uid: u32, reason: String, action: String },
    /// A VM has all its memory; `failed` pages of it could not be had.
    Populated { vm: String, seconds: f64, faults: u64, failed: u64 },
    /// A full VM was let go.
    Detached { vm: String },
    /// A session is over, and nothing of it is left in the pager.
    Ended { vm: String, reason: &'static str, seconds: f64, faults: u64, lacking: u64 },
    /// A page could not be had, and failed closed.
    Failed { vm: String, address: u64, page: Option<u32>, reason: String, action: String },
    /// A fault is older than the limit; `age` in seconds.
    Stall { vm: String, address: u64, age: f64 },
    /// Population met an error; faults go on being served.
    PopulationStopped { vm: String, address: u64, reason: String },
    /// The machine has no page for a VM; it is tried again until it has.
    NoMemory { vm: String, address: u64 },
    /// The VM did something that a pager cannot follow.
    Surprise { vm: String, what: String },
    /// The source is not what it was.
    SourceChanged { source: String, change: String },
    /// Someone wants to write the source, and is held back for so many seconds at most.
    LeaseBreaking { source: String, seconds: f64, change: String },
    /// The pager cannot do something that it may need.
    Warning { what: String },
    /// No new VM is taken.
    Draining { vms: usize },
    /// The drain waits for this VM.
    WaitingFor { vm: String, reason: &'static str },
    /// Every VM has ended or was let go.
    Drained,
    /// The pager ends and this VM lives: it waits for ever at its next fault or discard, until someone ends it. `lacking` pages
    /// had not come.
    Left { vm: String, lacking: u64 },
    /// So many events were dropped, since nobody read them.
    Lost { count: u64 },
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
