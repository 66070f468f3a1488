//! What a VM says of itself.

use std::path::PathBuf;

use serde::Serialize;

use crate::job::JobReport;
use crate::late::LateReport;
use crate::memory::Backing;
use crate::notify::NotifyReport;

/// What saving wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SaveReport {
    /// Length of the memory file.
    pub memory_bytes: u64,
    /// How much of it is data; the rest are holes.
    pub data_bytes: u64,
    /// How long it took, in nanoseconds.
    pub ns: u64,
}

/// What comparing every byte of guest memory found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// Fingerprint pages compared.
    pub pages: u64,
    /// How many of them are not what they should be.
    pub wrong_pages: u64,
    /// The first of them, by number.
    pub wrong: Vec<u64>,
    /// Pages of the system area (by guest-physical address) that are not what the VMM put there.
    pub wrong_system: Vec<u64>,
}

impl Comparison {
    /// Whether every byte is right.
    pub fn is_right(&self) -> bool {
        self.wrong_pages == 0 && self.wrong_system.is_empty()
    }
}

/// A VM at a glance. Times are nanoseconds of CLOCK_MONOTONIC since the VM began to be created or restored.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Its name.
    pub name: String,
    /// The process that it lives in.
    pub pid: u32,
    /// `kvm` or `threads`: whether the guest is one, or threads stand in for it.
    pub guest: &'static str,
    /// `running`, `paused` or `failed`.
    pub status: &'static str,
    /// Why it failed.
    pub error: Option<String>,
    /// vCPUs.
    pub vcpus: usize,
    /// What its memory is made of.
    pub backing: Backing,
    /// Bytes of memory.
    pub memory: u64,
    /// Fingerprint pages.
    pub pages: u64,
    /// (seed written last, or none for zeros; pages).
    pub contents: Vec<(Option<u64>, u64)>,
    /// The pager's socket and the form of the handshake.
    pub pager: Option<(PathBuf, &'static str)>,
    /// How many userfaultfds a pager has, each over a shard of the memory, and what was done instead of what `auto` stands for.
    pub shards: Option<(usize, Option<String>)>,
    /// What has come, and how, where the VMM itself brings the memory.
    pub late: Option<LateReport>,
    /// What the VMM's side has done, where its threads post to a pager.
    pub notify: Option<NotifyReport>,
    /// CLOCK_MONOTONIC when the VM began to be created or restored.
    pub origin_monotonic_ns: u64,
    /// When the VM was ready to run.
    pub ready_ns: u64,
    /// When the guest ran its first instruction.
    pub first_instruction_ns: Option<u64>,
    /// The job that runs or is paused.
    pub job: Option<JobReport>,
    /// The last job that ended.
    pub last_job: Option<JobReport>,
}
