//! Policy: what a user may choose for a VM.

use std::time::Duration;

/// Whether pages are brought before anyone asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Population {
    /// Only what is asked for.
    None,
    /// All of it, in the background, behind every fault.
    Background,
}

/// What happens to a VM whose page cannot be had. Never a zero page, never a silent hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnMissing {
    /// The VM is killed (SIGKILL through its pidfd).
    Kill,
    /// The page is poisoned (UFFDIO_POISON): for VMMs that turn that into a machine check or their own death. Some turn it into
    /// an MMIO exit, and a VMM that answers that with zero has lied to its guest.
    Poison,
}

/// How much comes with a page that is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAround {
    /// What the touches before it promise: the page alone where they are scattered, up to 2 MiB where they follow one another.
    Auto,
    /// The absent pages that follow it in an aligned window of so many bytes; at least the page.
    Window(u64),
}

impl FaultAround {
    /// The page alone.
    pub const NONE: Self = Self::Window(0);

    /// Bytes of the aligned stretch within which a touch may bring others along.
    pub const fn reach(self) -> u64 {
        match self {
            Self::Auto => super::around::LONGEST,
            Self::Window(bytes) => bytes,
        }
    }

    /// Bytes of the aligned window that is read where a page has to be waited for.
    pub(super) const fn window(self) -> u64 {
        match self {
            Self::Auto => super::around::PIECE,
            Self::Window(bytes) => bytes,
        }
    }
}

/// Where the worker that serves a VM runs, and how it waits. A worker serves many: it follows the one that gives it most of its
/// work, and blocks wherever the kernel likes while there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// On the core of the thread that faults where one thread does; else it spins where that pays and a core is to spare, else it
    /// blocks.
    Auto,
    /// It blocks until a fault comes.
    Block,
    /// It spins for a moment after each fault, and then blocks.
    Spin,
    /// It blocks, on the core where the thread that faults most ran last.
    SameCore,
    /// It blocks, on this core.
    Core(usize),
}

/// What a user may choose for a VM: one frozen value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether pages are brought before anyone asks.
    pub population: Population,
    /// How much comes with a page that is touched.
    pub fault_around: FaultAround,
    /// Where the worker that serves it runs, and how it waits.
    pub placement: Placement,
    /// What happens to a VM whose page cannot be had.
    pub on_missing: OnMissing,
    /// A fault that is older is reported.
    pub stall_warning: Duration,
    /// How long a peer may take over its handshake.
    pub handshake_timeout: Duration,
    /// Users that may connect; `None` leaves it to the socket's mode.
    pub allow_uids: Option<Vec<u32>>,
    /// Permission bits of the socket.
    pub mode: u32,
    /// User and group whom the socket's file is given to; `None` leaves it ours.
    pub owner: Option<(u32, u32)>,
    /// Whether a VM that has all its memory is let go.
    pub detach_when_full: bool,
    /// Entries of the trace ring, 16 bytes each; 0 keeps no trace.
    pub trace: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            population: Population::None,
            fault_around: FaultAround::Auto,
            placement: Placement::Auto,
            on_missing: OnMissing::Kill,
            stall_warning: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            allow_uids: None,
            mode: 0o660,
            owner: None,
            detach_when_full: false,
            trace: 1024,
        }
    }
}
