//! What a session has to tell its host: everything here is off the path of a fault that is served.

use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::Session;
use crate::sys::pidfd::PidFd;

/// What was done to a VM that could not be given a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It was killed.
    Killed,
    /// The page was poisoned.
    Poisoned,
    /// Nothing could be done; it waits for ever, or until someone kills it.
    Held(Errno),
    /// Nothing could be done, since its process cannot be seen from here (another pid namespace).
    HeldUnseen,
    /// Nothing was done, since the VM is part of this very process.
    HeldSelf,
}

impl Action {
    /// Kills a VM, and says what came of it.
    pub(crate) fn by_killing(pid: Option<u32>, process: Option<&PidFd>) -> Self {
        if pid == Some(std::process::id()) {
            return Self::HeldSelf;
        }
        match process.map(PidFd::kill) {
            // A process that has ended is as good as killed.
            Some(Ok(()) | Err(Errno::SRCH)) => Self::Killed,
            // EINVAL: it lives in a pid namespace that cannot be seen from here.
            Some(Err(Errno::INVAL)) | None => Self::HeldUnseen,
            Some(Err(errno)) => Self::Held(errno),
        }
    }

    /// Whether whoever asked for the page waits for ever.
    pub const fn holds(self) -> bool {
        matches!(self, Self::Held(_) | Self::HeldUnseen | Self::HeldSelf)
    }
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Killed => f.write_str("killed"),
            Self::Poisoned => f.write_str("poisoned"),
            Self::Held(errno) => {
                write!(f, "held: it cannot be killed ({errno}), and waits until someone does")
            }
            Self::HeldUnseen => {
                f.write_str("held: its process cannot be seen from here, and waits until someone kills it")
            }
            Self::HeldSelf => f.write_str("held: the VM is part of the pager's own process"),
        }
    }
}

/// What became of letting a VM go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LetGo {
    /// Its faults are the kernel's own from now on.
    Done,
    /// It discards memory just now, and someone must read its event: try again in a moment.
    NotYet,
    /// It must be kept: it lacks memory, or waits for a page that failed, or its memory must stay registered.
    Kept,
}

/// Why a session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The VM has gone.
    Gone,
    /// The VM has all its memory and was let go.
    Detached,
    /// The pager was closed while the VM still lived.
    Closed,
}

/// Something that a session's host should know.
#[derive(Debug)]
pub enum Report {
    /// Every page is there: nothing is owed to this VM any more.
    Full,
    /// A page could not be had.
    Failed {
        /// The address that was wanted, in the VMM.
        hva: u64,
        /// The page, where the address is in a region.
        page: Option<u32>,
        /// Why.
        reason: String,
        /// What was done about it.
        action: Action,
    },
    /// Population met an error and stopped; faults go on being served.
    PopulationStopped {
        /// The page, by its index in the session.
        page: u32,
        /// Why.
        reason: String,
    },
    /// A fault has grown older than the limit.
    Stalled {
        /// Its address in the VMM.
        hva: u64,
        /// How long it has waited.
        age: Duration,
    },
    /// The kernel has no memory for a page; it is tried again until it has.
    NoMemory {
        /// The address, in the VMM.
        hva: u64,
    },
    /// A message that a session cannot serve, in words.
    Surprise(String),
    /// The session is over for this reason, and asks to be taken down.
    Over(End),
}

/// What a session needs of whoever runs it.
pub trait Host: Send + Sync {
    /// Takes a report.
    fn report(&self, session: &Session, report: Report);

    /// Has an I/O thread call [`Session::finish_read`] for a page that is in flight.
    fn read_later(&self, session: &Arc<Session>, page: u32);

    /// Has the worker of a session's shard look at it again soon.
    fn nudge(&self, session: &Session, shard: usize);
}
