//! Peers that were refused after they had sent a userfaultfd: they would hang at their next fault, or, were the descriptor
//! closed, go on with zero pages. So they are killed, or their faults poisoned, and the descriptor is held until they are dead.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;

use crate::session::{Action, OnMissing};
use crate::sys::pidfd::PidFd;
use crate::sys::uffd::{InstallMode, Message, MessageBuffer, Userfaultfd};

/// Reads at a visit: the next one comes with the next tick, whatever a peer does.
const READS: usize = 16;

pub(super) struct Condemned {
    userfaultfds: Vec<Userfaultfd>,
    process: Option<PidFd>,
    on_missing: OnMissing,
    pid: Option<u32>,
}

/// What is done to a refused peer, with its faults to come.
pub(super) fn sentence(on_missing: OnMissing, pid: Option<u32>, process: Option<&PidFd>) -> Action {
    match on_missing {
        OnMissing::Poison => Action::Poisoned,
        OnMissing::Kill => Action::by_killing(pid, process),
    }
}

impl Condemned {
    pub(super) fn new(
        userfaultfds: Vec<Userfaultfd>,
        process: Option<PidFd>,
        on_missing: OnMissing,
        pid: Option<u32>,
    ) -> Self {
        Self { userfaultfds, process, on_missing, pid }
    }

    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.userfaultfds.iter().map(Userfaultfd::as_fd)
    }

    /// What the operator should know when nobody holds it any more.
    pub(super) fn last_word(&self) -> String {
        let who = self.pid.map_or_else(
            || "a process that cannot be seen from here".to_owned(),
            |pid| format!("process {pid}"),
        );
        format!("{who} was refused, and still waits for pages that nobody will bring: kill it")
    }

    /// Whether it still must be held.
    pub(super) fn lives(&self) -> bool {
        self.userfaultfds.iter().any(Userfaultfd::has_memory)
    }

    /// Poisons what it touches, where that is the policy. Reading also lets its discards go on.
    pub(super) fn attend(&self, buffer: &mut MessageBuffer) {
        for userfaultfd in &self.userfaultfds {
            for _ in 0..READS {
                if !matches!(userfaultfd.read(buffer), Ok(read) if read > 0) {
                    break;
                }
                for message in buffer.drain() {
                    if let Message::PageFault { address, .. } = message
                        && self.on_missing == OnMissing::Poison
                        && !poison(userfaultfd, address)
                    {
                        sentence(OnMissing::Kill, self.pid, self.process.as_ref());
                    }
                }
            }
        }
    }
}

/// The page size is not known: one of them fits.
fn poison(userfaultfd: &Userfaultfd, address: u64) -> bool {
    [4096, 2 << 20].into_iter().any(|bytes: u64| {
        let start = address / bytes * bytes;
        match userfaultfd.poison(start, bytes, InstallMode::empty()).stopped {
            None => true,
            Some(Errno::EXIST) => userfaultfd.wake(start, bytes).is_ok(),
            Some(_) => false,
        }
    })
}
