//! What can go wrong with a VM.

use std::io;
use std::path::PathBuf;

use latepage::attachment::shards::ShardError;
use latepage::sys::mapping::MapError;
use latepage::sys::uffd::{CreateError, UffdError};
use rustix::io::Errno;

/// Anything that a VM refuses or suffers. The message is one line and says what to do, where that is known.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A VM cannot have that much memory.
    #[error("{bytes} bytes of memory: {why}")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// Why not.
        why: &'static str,
    },
    /// A VM cannot have that many vCPUs.
    #[error("{vcpus} vCPUs: on {guest} it must be 1 to {most}")]
    Vcpus {
        /// vCPUs asked for.
        vcpus: u32,
        /// What is to run the guest.
        guest: &'static str,
        /// The most that it has.
        most: u32,
    },
    /// The options contradict each other.
    #[error("{0}")]
    Config(String),
    /// There is no KVM, and it was asked for.
    #[error("/dev/kvm: {0}; use a guest of threads (--guest threads) or run where KVM is")]
    NoKvm(Errno),
    /// This kernel has no memory-fault exits, or not of the kind that was asked for.
    #[error("this kernel has no memory-fault exits: {why}; --delivery uffd or --guest threads needs none")]
    NoExits {
        /// What was tried, and what lacks.
        why: String,
    },
    /// Memory cannot come from this file.
    #[error("late memory from {}: {why}", path.display())]
    LateMemory {
        /// The memory file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A call to KVM failed.
    #[error("{call}: {errno}")]
    Kvm {
        /// The ioctl.
        call: &'static str,
        /// What KVM said.
        errno: Errno,
    },
    /// Guest memory could not be mapped.
    #[error("guest memory: {0}")]
    Map(#[from] MapError),
    /// A system call failed.
    #[error("{call}: {errno}")]
    Call {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// A file of a snapshot could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// A state file is not one that this VMM can restore.
    #[error("state file {}: {why}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A memory file does not have the size of the VM's memory.
    #[error("memory file {} has {file} bytes, and the VM of this state has {vm}: it belongs to another snapshot", path.display())]
    MemoryFileSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        file: u64,
        /// The size of the VM's memory in bytes.
        vm: u64,
    },
    /// The pager's socket could not be reached, or the handshake not be sent.
    #[error("pager at {}: {source}{}", path.display(), connect_hint(source))]
    Pager {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// No userfaultfd could be made.
    #[error("userfaultfd: {0}")]
    Userfaultfd(#[from] CreateError),
    /// Guest memory could not be registered with the userfaultfd.
    #[error("userfaultfd: {0}")]
    Register(#[from] UffdError),
    /// The VM does something already.
    #[error("the VM is busy: {0}")]
    Busy(String),
    /// A job cannot be run.
    #[error("this job cannot be run: {0}")]
    Job(String),
    /// A range cannot be discarded.
    #[error("this range cannot be discarded: {0}")]
    Range(String),
    /// A range could not be discarded, and holds what it did.
    #[error("pages of memory from {first} on were not discarded: {why}")]
    Discard {
        /// The first of them, by its index in the session.
        first: u32,
        /// Why not.
        why: String,
    },
    /// vCPUs did not come out of the guest: they wait for memory that nobody brings.
    #[error(
        "{vcpus} of the VM's vCPUs have not stopped after {seconds} s: they wait for memory; is their pager alive?"
    )]
    Stuck {
        /// vCPUs still in the guest.
        vcpus: usize,
        /// Seconds waited.
        seconds: u64,
    },
    /// The VM has failed before, and is not usable any more.
    #[error("the VM has failed: {0}")]
    Failed(String),
    /// The API socket could not be made.
    #[error("API socket {}: {why}", path.display())]
    ApiSocket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        why: String,
    },
}

fn connect_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => " (is `latepage serve` running there?)",
        _ => "",
    }
}

impl VmError {
    pub(crate) fn call(call: &'static str, errno: Errno) -> Self {
        Self::Call { call, errno }
    }

    pub(crate) fn thread(source: &io::Error) -> Self {
        Self::Call { call: "starting a thread", errno: Errno::from_io_error(source).unwrap_or(Errno::AGAIN) }
    }

    pub(crate) fn trap_of_threads() -> Self {
        Self::Config("a trap goes with a guest on KVM; the accesses of threads come back by a signal".into())
    }

    pub(crate) fn signal(source: &io::Error) -> Self {
        Self::Call { call: "sigaction", errno: Errno::from_io_error(source).unwrap_or(Errno::INVAL) }
    }

    pub(crate) fn copy(source: &io::Error) -> Self {
        Self::Call {
            call: "copying a descriptor",
            errno: Errno::from_io_error(source).unwrap_or(Errno::MFILE),
        }
    }

    pub(crate) fn kvm(call: &'static str, error: kvm_ioctls::Error) -> Self {
        Self::Kvm { call, errno: Errno::from_raw_os_error(error.errno()) }
    }

    pub(crate) fn file(path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File { path, source }
    }

    /// A word for the kind of error: `usage` (what was asked for cannot be), `busy`, `failed` (the VM is lost), or `error`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Memory { .. } | Self::Vcpus { .. } | Self::Config(_) | Self::Job(_) | Self::Range(_) => {
                "usage"
            }
            Self::Busy(_) => "busy",
            Self::Failed(_) => "failed",
            _ => "error",
        }
    }

    /// The call that failed, and its errno, where it was one.
    pub fn call_and_errno(&self) -> (Option<&str>, Option<i32>) {
        match self {
            Self::NoKvm(errno) => (Some("open"), Some(errno.raw_os_error())),
            Self::Kvm { call, errno } | Self::Call { call, errno } => {
                (Some(call), Some(errno.raw_os_error()))
            }
            Self::Map(error) => (Some(error.call), Some(error.errno.raw_os_error())),
            Self::File { source, .. } => (None, source.raw_os_error()),
            Self::Pager { source, .. } => (Some("connect"), source.raw_os_error()),
            Self::Register(error) => (Some(error.call), Some(error.errno.raw_os_error())),
            _ => (None, None),
        }
    }
}

impl From<ShardError> for VmError {
    fn from(error: ShardError) -> Self {
        match error {
            ShardError::Shards(error) => Self::Config(error.to_string()),
            ShardError::Create(error) => Self::Userfaultfd(error),
            ShardError::Register { source, .. } => Self::Register(source),
        }
    }
}
