//! What a VMM says at the socket: who it is, where its memory lies, and the descriptors that it hands over.
//!
//! Two forms on the same socket, told apart by the first byte of the JSON: Firecracker's is an array ([`firecracker`]), ours
//! an object ([`native`]). [`Incoming`] takes a handshake as it arrives, in whatever parts, and does no I/O itself.
//! `docs/handshake.md` is the protocol.
//!
//! Everything here was said by a stranger: nothing in it is trusted, and a [`Refusal`] keeps the userfaultfd that came with
//! a handshake, since to close it while its VM lives would let the VM's waiting accesses through to zero pages.

mod assemble;
pub mod firecracker;
mod incoming;
pub mod native;
mod places;
mod refusal;
mod scan;
pub mod shards;
#[cfg(test)]
mod tests;

pub use self::incoming::{Fed, Incoming, MAX_BODY, MAX_DESCRIPTORS, MAX_NESTING};
pub use self::refusal::{Refusal, RefusalReason};

use std::fmt;
use std::os::fd::OwnedFd;

use crate::delivery::channel::{ChannelMemory, Reader};
use crate::install::PageBitmap;
use crate::memory::{Layout, PageTable, Shards};
use crate::sys::uffd::Userfaultfd;

/// Which protocol the peer spoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// Firecracker's page-fault-handler protocol: a JSON array.
    Firecracker,
    /// Ours: a JSON object with a version.
    Latepage,
}

/// What the guest's memory is made of in the VMM. It decides which installs are possible and what a discarded page reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A private mapping of a memory file.
    Private,
    /// A shared mapping of a memory file.
    Shared,
    /// Pages of 2 MiB from the hugetlb pool.
    Hugetlb,
}

/// A handshake that was understood.
#[derive(Debug)]
pub struct Hello {
    /// Which protocol it came in.
    pub form: Form,
    /// The VM's name, where the protocol has one.
    pub name: Option<String>,
    /// How many virtual CPUs the VM has; 1 where the protocol does not say.
    pub vcpus: u32,
    /// What its memory is made of.
    pub backing: Backing,
    /// Where its memory lies.
    pub layout: Layout,
    /// How its memory is divided among its userfaultfds: undivided, where there is one or none.
    pub shards: Shards,
    /// Its faults, or those of them that no channel carries: a userfaultfd for each shard, or none where there is a channel.
    pub userfaultfds: Vec<Userfaultfd>,
    /// The file that its memory is a mapping of, sealed against shrinking and long enough for every region's offset.
    pub memory: Option<OwnedFd>,
    /// The channel that its faults are posted to. There is `memory`, then.
    pub notify: Option<Notify>,
}

/// What comes with the delivery `notify`.
#[derive(Debug)]
pub struct Notify {
    /// The channel, of which this process is the reader.
    pub reader: Reader<ChannelMemory>,
    /// A bit for each page that traps, if the pager is to clear them.
    pub bitmap: Option<PageBitmap>,
    /// The states of its pages, as the reader before has left them, if there was one: the session keeps them there.
    pub pages: Option<PageTable>,
}

impl Form {
    /// As log lines and results name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Firecracker => "firecracker",
            Self::Latepage => "latepage",
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Backing {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 4] = [Self::Anonymous, Self::Private, Self::Shared, Self::Hugetlb];

    /// As the handshake has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::Private => "private",
            Self::Shared => "shared",
            Self::Hugetlb => "hugetlb",
        }
    }

    /// The backing of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|backing| backing.name() == name)
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
