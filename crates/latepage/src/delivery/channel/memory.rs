//! A channel's memory, mapped: by the VMM that makes it, and by the pager that it was sent to.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::EventfdFlags;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::protocol::{BadHeader, BadShape, Header, Reader, Shape, Shared, Woken};
use crate::sys::futex;
use crate::sys::mapping::{MapError, Mapping};
use crate::sys::memfd::{self, NotFixed};

/// The memory of a channel, mapped into this process, and the eventfd by which its reader is woken.
#[derive(Debug)]
pub struct ChannelMemory {
    mapping: Mapping,
    bell: OwnedFd,
    /// The reader's own open of the memory: what it holds its lock by.
    _reading: Option<OwnedFd>,
}

impl Shared for ChannelMemory {
    fn word(&self, offset: usize) -> &AtomicU64 {
        self.mapping.word(offset)
    }

    fn sleep(&self, offset: usize, low: u32, timeout: Option<Duration>) -> Woken {
        match futex::wait(self.word(offset), low, timeout) {
            Err(Errno::INTR) => Woken::Interrupted,
            Err(Errno::TIMEDOUT) => Woken::TimedOut,
            _ => Woken::Look,
        }
    }

    fn wake(&self, offset: usize) {
        // Only one thread sits at a slot; whoever else sleeps on it looks for himself.
        futex::wake(self.word(offset), i32::MAX);
    }

    fn ring(&self) {
        // It only fails when it rings already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

impl ChannelMemory {
    /// The eventfd that is written when a reader that sleeps is to look.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// A channel could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// No such channel.
    #[error(transparent)]
    Shape(#[from] BadShape),
    /// A call failed.
    #[error("{call}: {errno}")]
    Call {
        /// Which one.
        call: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// Its memory could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// A channel cannot be used. Each text says why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Its memory cannot be trusted to stay.
    #[error(transparent)]
    NotFixed(#[from] NotFixed),
    /// It is no channel, or none that this side understands.
    #[error(transparent)]
    Header(#[from] BadHeader),
    /// It is for another session.
    #[error("it is a channel for {said} pages and the regions have {pages}")]
    Pages {
        /// What it says.
        said: u32,
        /// What the regions have.
        pages: u32,
    },
    /// It has fewer slots than there are vCPUs.
    #[error("it has {slots} slots for {vcpus} vCPUs: each needs one of its own")]
    FewSlots {
        /// Its slots.
        slots: u32,
        /// What the VM has.
        vcpus: u32,
    },
    /// Another reader has it, and lives.
    #[error("another reader has it: a channel has one at a time")]
    Taken,
    /// It could not be opened anew, to be locked.
    #[error("it cannot be opened by /proc/self/fd, to be locked: {0}")]
    Open(Errno),
    /// It could not be locked.
    #[error("flock: {0}")]
    Lock(Errno),
    /// It could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// What came for its eventfd is none.
    #[error("its eventfd is {0}, no eventfd")]
    NotEventfd(String),
}

/// Makes a channel's memory, writes its header, and maps it.
pub(super) fn make(shape: Shape) -> Result<(Arc<ChannelMemory>, OwnedFd), MakeError> {
    let failed = |call| move |errno| MakeError::Call { call, errno };
    let file =
        memfd::create_fixed("latepage-channel", shape.bytes() as u64).map_err(failed("memfd_create"))?;
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    let bell = rustix::event::eventfd(0, flags).map_err(failed("eventfd"))?;
    let mapping = Mapping::shared(file.as_fd(), 0, shape.bytes())?;
    for (offset, word) in Header::OFFSETS.into_iter().zip(Header::of(shape).words()).rev() {
        // The magic number last.
        mapping.word(offset).store(word, Ordering::Release);
    }
    Ok((Arc::new(ChannelMemory { mapping, bell, _reading: None }), file))
}

/// What a channel that somebody else has made says of itself, and that its memory can be trusted to stay.
fn check(memory: BorrowedFd<'_>, bell: &OwnedFd) -> Result<Shape, AttachError> {
    let length = memfd::check_fixed(memory)?;
    check_bell(bell)?;
    // Long enough for the header at least; a length that is no channel's shows when that was read.
    let shortest = Shape::new(1, 1).expect("a slot and a page").bytes() as u64;
    if length < shortest {
        return Err(NotFixed::Length { length, needed: shortest }.into());
    }
    let head = Mapping::shared(memory, 0, shortest as usize)?;
    let words = Header::OFFSETS.map(|offset| head.word(offset).load(Ordering::Acquire));
    let shape = Header::read(words).check()?;
    let needed = shape.bytes() as u64;
    if length != needed {
        return Err(NotFixed::Length { length, needed }.into());
    }
    Ok(shape)
}

/// Maps a channel that somebody else has made, for a VMM's threads to sit at.
pub(super) fn adopt(
    memory: BorrowedFd<'_>,
    bell: OwnedFd,
) -> Result<(Arc<ChannelMemory>, Shape), AttachError> {
    let shape = check(memory, &bell)?;
    let mapping = Mapping::shared(memory, 0, shape.bytes())?;
    Ok((Arc::new(ChannelMemory { mapping, bell, _reading: None }), shape))
}

/// Begins to read a channel that a stranger has sent, for a session of so many pages and vCPUs.
///
/// # Errors
/// [`AttachError`].
pub fn attach(
    memory: BorrowedFd<'_>,
    bell: OwnedFd,
    pages: u32,
    vcpus: u32,
) -> Result<Reader<ChannelMemory>, AttachError> {
    let shape = check(memory, &bell)?;
    if shape.pages() != pages {
        return Err(AttachError::Pages { said: shape.pages(), pages });
    }
    if shape.slots() < vcpus {
        return Err(AttachError::FewSlots { slots: shape.slots(), vcpus });
    }
    let reading = lock(memory)?;
    let mapping = Mapping::shared(memory, 0, shape.bytes())?;
    Ok(Reader::begin(ChannelMemory { mapping, bell, _reading: Some(reading) }, shape))
}

/// Locks it for the one reader that there may be. The kernel lets go of it when that one is dead, however it died.
///
/// By an open of our own: a descriptor that was sent shares its open file, and its lock, with everyone else who has it.
fn lock(memory: BorrowedFd<'_>) -> Result<OwnedFd, AttachError> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", memory.as_raw_fd()));
    let reading =
        rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(AttachError::Open)?;
    match rustix::fs::flock(&reading, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(reading),
        Err(Errno::AGAIN) => Err(AttachError::Taken),
        Err(errno) => Err(AttachError::Lock(errno)),
    }
}

fn check_bell(bell: &OwnedFd) -> Result<(), AttachError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", bell.as_raw_fd()));
    let what = link.map_or_else(|_| "unknown".to_owned(), |link| link.to_string_lossy().into_owned());
    if what == "anon_inode:[eventfd]" { Ok(()) } else { Err(AttachError::NotEventfd(what)) }
}
