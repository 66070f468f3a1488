//! A crowd: up to thousands of threads that touch memory which is not there, each touch timed, by each delivery.
//!
//! It is what `latepage bench scale` measures: a guest of threads without KVM, whose memory is shared and comes page by page. How a
//! thread's access reaches whoever brings the page is the delivery:
//!
//! - `uffd`: the kernel queues the fault at a userfaultfd, or at one of several, that a pager reads;
//! - `exit`: the access comes back to the thread (a SIGBUS stands for a memory-fault exit), which brings the page itself;
//! - `notify`: it comes back, the thread posts it to a pager through a channel, waits, and exposes what the pager has filled.
//!
//! `channel` times the steps of the last one.

pub mod channel;
mod exit;
mod memory;
mod notify;
mod touch;
mod uffd;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::VmError;

pub use touch::word_at;

/// How accesses reach whoever brings the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CrowdDelivery {
    /// By a userfaultfd that a pager reads.
    Uffd,
    /// Back to the thread, which resolves it.
    Exit,
    /// Back to the thread, which posts it to a pager.
    Notify,
}

/// What a crowd does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Crowd {
    /// How its faults are delivered.
    pub delivery: CrowdDelivery,
    /// Threads, 1 to 4,096.
    pub threads: u32,
    /// Its memory in pages of 4 KiB: as many as the memory file has.
    pub pages: u32,
    /// So many of them are touched, once each, in random order.
    pub touches: u32,
    /// Of that order.
    #[serde(default)]
    pub seed: u64,
    /// How many userfaultfds, each over a shard of the memory, for `uffd`.
    #[serde(default = "one")]
    pub shards: u32,
    /// The pager's socket, for `uffd` and `notify`.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// The memory file, for `exit`.
    #[serde(default)]
    pub memory_file: Option<PathBuf>,
    /// How often a thread looks at its slot before it sleeps, for `notify`.
    #[serde(default)]
    pub spins: u32,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CrowdReport {
    /// From the moment when all threads were ready to the last touch.
    pub ns: u64,
    /// CPU of its threads meanwhile.
    pub cpu_ns: u64,
    /// How many touches there were.
    pub touches: usize,
    /// Of them, those that took less than a microsecond: their page was there.
    pub there: usize,
    /// Words that were not what the memory file of the benches has.
    pub wrong: u64,
    /// Of the others, half took no longer than this.
    pub p50: u64,
    /// And 99 in a hundred no longer than this.
    pub p99: u64,
}

fn one() -> u32 {
    1
}

impl Crowd {
    /// Has it touch what it should.
    ///
    /// # Errors
    /// [`VmError`]: it cannot be made. A page that cannot be had ends the process by SIGBUS, or leaves its thread waiting, as a guest's
    /// would.
    pub fn run(&self) -> Result<CrowdReport, VmError> {
        if !(1..=4096).contains(&self.threads) {
            return Err(VmError::Config(format!(
                "a crowd of {} threads: it must be 1 to 4096",
                self.threads
            )));
        }
        if !(self.threads..=self.pages).contains(&self.touches) {
            return Err(VmError::Config(format!(
                "{} touches by {} threads of {} pages: each thread touches one at least, and no page is touched twice",
                self.touches, self.threads, self.pages
            )));
        }
        if self.shards != 1 && self.delivery != CrowdDelivery::Uffd {
            return Err(VmError::Config("several userfaultfds go with the delivery uffd".into()));
        }
        let missing = |what| VmError::Config(format!("a crowd of this delivery takes a {what}"));
        let socket = || self.socket.as_deref().ok_or_else(|| missing("socket"));
        match self.delivery {
            CrowdDelivery::Uffd => uffd::run(self, socket()?),
            CrowdDelivery::Notify => notify::run(self, socket()?),
            CrowdDelivery::Exit => {
                exit::run(self, self.memory_file.as_deref().ok_or_else(|| missing("memory_file"))?)
            }
        }
    }
}
