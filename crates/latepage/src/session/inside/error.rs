//! What can go wrong. A reason is made without an allocation of its own, so that one may be had in a signal's handler.

use std::fmt;

use rustix::io::Errno;

use super::super::answer::NoAnswer;
use crate::install::Stop;
use crate::source::SourceError;
use crate::sys::mapping::MapError;
use crate::sys::uffd::{CreateError, UffdError};

/// A resolver could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ResolverError {
    /// Of a huge page that cannot be installed the kernel does not tell whether one is there or none can be had, which only a discard
    /// that waits for us could change.
    #[error("memory of huge pages is not resolved inside a VMM; use pages of 4 KiB")]
    HugePages,
    /// The snapshot is not this VM's, or cannot be served.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// No userfaultfd.
    #[error("userfaultfd: {0}")]
    Userfaultfd(#[from] CreateError),
    /// The guest view could not be registered.
    #[error("the guest view: {0}")]
    Register(#[from] UffdError),
    /// The install view could not be mapped.
    #[error("the install view: {0}")]
    Map(#[from] MapError),
}

/// A page that cannot be had. The vCPU that wants it must not run on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory at {at} could not be had: {reason}")]
pub struct Unresolved {
    /// Where.
    pub at: Address,
    /// Why.
    pub reason: Reason,
}

/// An address of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// For the guest.
    Guest(u64),
    /// In the VMM.
    Host(u64),
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(address) => write!(formatter, "guest address {address:#x}"),
            Self::Host(address) => write!(formatter, "host address {address:#x}"),
        }
    }
}

/// Why a page cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// It is no memory of the guest.
    #[error("no region has it")]
    NoRegion,
    /// Whoever wanted it first was told why.
    #[error("it could not be had before")]
    Before,
    /// The source does not have it.
    #[error(transparent)]
    NoAnswer(#[from] NoAnswer),
    /// For many seconds.
    #[error("the kernel has no memory for it")]
    NoMemory,
    /// A call failed.
    #[error("the kernel would not install it: {0}")]
    Install(Errno),
    /// It still traps.
    #[error("its trap could not be disarmed: {0}")]
    Trap(Errno),
}

impl From<SourceError> for Reason {
    fn from(error: SourceError) -> Self {
        Self::NoAnswer(NoAnswer::Source(error))
    }
}

impl From<Stop> for Reason {
    fn from(stop: Stop) -> Self {
        Self::Install(match stop {
            Stop::NoMemory => return Self::NoMemory,
            Stop::AlreadyThere => Errno::EXIST,
            Stop::Busy => Errno::AGAIN,
            Stop::Unmapped => Errno::NOENT,
            Stop::Gone => Errno::SRCH,
            Stop::Hole => Errno::FAULT,
            Stop::Failed(errno) => errno,
        })
    }
}
