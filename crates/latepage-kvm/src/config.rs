//! What a VM is created or restored from, and what may be discarded.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::late::Delivery;
use crate::machine::GuestKind;
use crate::memory::Backing;
use crate::shards::ShardCount;
use crate::trap::TrapKind;

/// A VM to create.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Its name: 1 to 64 of `A-Z a-z 0-9 . _ -`.
    pub name: String,
    /// Bytes of memory, a multiple of 2 MiB.
    pub memory: u64,
    /// Whether the upper half lies at 4 GiB, however small the memory is.
    #[serde(default)]
    pub split: bool,
    /// What the memory is made of.
    #[serde(default)]
    pub backing: Backing,
    /// vCPUs, 1 to 64; of a guest of threads, to 1024.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// What runs the guest.
    #[serde(default)]
    pub guest: GuestKind,
}

fn one() -> u32 {
    1
}

/// Where a restored VM's memory comes from.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case", deny_unknown_fields)]
pub enum MemoryFrom {
    /// The memory file, read in before the guest starts.
    Read {
        /// The memory file.
        memory_file: PathBuf,
    },
    /// A private mapping of the memory file: the kernel brings pages when they are touched.
    Map {
        /// The memory file.
        memory_file: PathBuf,
    },
    /// A pager: memory is absent, and its faults go to the pager.
    Pager {
        /// The pager's socket.
        socket: PathBuf,
        /// Which handshake.
        handshake: Handshake,
        /// Whether the memfd goes with the handshake (ours only); unset, it does if the backing is shared.
        #[serde(default)]
        send_memory: Option<bool>,
        /// How many userfaultfds, each over a shard of the memory (ours only); unset, one.
        #[serde(default)]
        shards: Option<ShardCount>,
    },
    /// The memory file, page by page as they are touched, by the VMM itself.
    Late(LateMemory),
    /// A pager to which the VMM's own threads post what they want: the delivery `notify`.
    Notify(NotifyMemory),
}

/// Memory that a pager brings, asked for through a channel. It is shared memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NotifyMemory {
    /// The pager's socket.
    pub socket: PathBuf,
    /// What makes a vCPU's access an exit; unset, the best that this kernel has.
    #[serde(default)]
    pub trap: Option<TrapKind>,
    /// Whether the pager gets no userfaultfd: then the VMM posts what comes by it, too, and exposes every page itself.
    #[serde(default)]
    pub all: bool,
}

/// Memory that the VMM itself brings when it is touched. It is shared memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LateMemory {
    /// The memory file.
    pub memory_file: PathBuf,
    /// How accesses to absent pages reach the VMM.
    #[serde(default)]
    pub delivery: Delivery,
    /// What makes a vCPU's access an exit; unset, the best that this kernel has.
    #[serde(default)]
    pub trap: Option<TrapKind>,
    /// Bytes that come with a touched page, a multiple of 4096, 65536 at most; unset, the page alone.
    #[serde(default)]
    pub window: Option<u64>,
}

/// The form in which a VM introduces itself to a pager.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Handshake {
    /// The array of regions that Firecracker sends.
    Firecracker,
    /// Our object.
    #[default]
    Latepage,
}

/// A VM to restore.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// Its name; the saved VM's if not given.
    #[serde(default)]
    pub name: Option<String>,
    /// The state file.
    pub state_file: PathBuf,
    /// Where its memory comes from.
    pub memory: MemoryFrom,
    /// What its memory is made of; the saved VM's if not given. A mapped memory file backs itself.
    #[serde(default)]
    pub backing: Option<Backing>,
    /// What runs the guest.
    #[serde(default)]
    pub guest: GuestKind,
    /// Whether it waits for `resume` before its first instruction.
    #[serde(default)]
    pub paused: bool,
}

/// Pages to give back to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum DiscardRange {
    /// By fingerprint page.
    Pages {
        /// The first page.
        first: u64,
        /// How many.
        count: u64,
    },
    /// By guest-physical address.
    Gpa {
        /// The first byte.
        gpa: u64,
        /// How many.
        bytes: u64,
    },
}
