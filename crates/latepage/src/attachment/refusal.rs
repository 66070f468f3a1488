//! Why a peer is refused, and what is kept of it.

use crate::delivery::channel::AttachError;
use crate::install::BitmapError;
use crate::memory::{Layout, LayoutError, PageTableError, ShardsError};
use crate::source::SourceError;
use crate::sys::mapping::MapError;
use crate::sys::memfd::NotSealed;
use crate::sys::uffd::Userfaultfd;

use super::{Backing, Form, MAX_BODY, MAX_DESCRIPTORS, MAX_NESTING};

/// A peer that is not served.
///
/// Every userfaultfd that it sent is kept: whoever takes the refusal must hold them until the peer is dead.
#[derive(Debug)]
pub struct Refusal {
    /// Why. Its text is one line, for the log.
    pub reason: RefusalReason,
    /// What must not be closed while the peer lives. Empty if it sent none.
    pub userfaultfds: Vec<Userfaultfd>,
    /// Where its memory lies, if that much was understood: what poisoning its pages needs.
    pub layout: Option<Layout>,
}

/// Why a peer is refused. Each text says which, why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum RefusalReason {
    /// It connected, said nothing, and left.
    #[error("the peer closed the connection without a handshake")]
    Silent,
    /// It left in the middle.
    #[error("the peer closed the connection after {bytes} bytes, in the middle of its handshake")]
    Incomplete {
        /// Bytes that had arrived.
        bytes: usize,
    },
    /// It said nothing, or too little, for too long.
    #[error(
        "no whole handshake in time: {bytes} bytes and {descriptors} descriptors arrived; send the JSON and its descriptors right after connecting"
    )]
    Late {
        /// Bytes that had arrived.
        bytes: usize,
        /// Descriptors that had arrived.
        descriptors: usize,
    },
    /// Not JSON, or not one of the two forms.
    #[error(
        "the handshake is no JSON array (Firecracker's form) and no JSON object (latepage's): it starts with {start}"
    )]
    NeitherForm {
        /// Its first byte, printable.
        start: String,
    },
    /// JSON that does not hold together, or not what the form asks for.
    #[error("{form} handshake: {message}")]
    Malformed {
        /// Which form it began as.
        form: Form,
        /// What the parser found, with line and column.
        message: String,
    },
    /// More than a handshake may have.
    #[error("the handshake is longer than {MAX_BODY} bytes")]
    Huge,
    /// Nested as no handshake is.
    #[error("the handshake is nested more than {MAX_NESTING} deep")]
    Deep,
    /// Bytes after the document.
    #[error(
        "the handshake goes on after its JSON: {bytes} bytes too many; send one document and nothing else"
    )]
    Trailing {
        /// Bytes after the document, as far as they have arrived.
        bytes: usize,
    },
    /// A version that this pager does not speak.
    #[error("handshake version {version} is not known; this pager speaks version {known}")]
    Version {
        /// What was said.
        version: String,
        /// What is known.
        known: u64,
    },
    /// A value of a key that is not one of those known.
    #[error("handshake: {key} {value} is not known; {known}")]
    Value {
        /// The key.
        key: &'static str,
        /// What was said.
        value: String,
        /// What could be said.
        known: &'static str,
    },
    /// The same descriptor was announced twice, or one that there must be not at all.
    #[error("handshake: descriptors {list}: {rule}")]
    DescriptorList {
        /// What was said.
        list: String,
        /// What there must be.
        rule: &'static str,
    },
    /// Backing, page sizes and descriptors do not go together.
    #[error("handshake: backing \"{backing}\" {why}")]
    Backing {
        /// What was said, or follows from the descriptors.
        backing: Backing,
        /// What it does not go with.
        why: &'static str,
    },
    /// The regions are no layout.
    #[error("the VM's regions: {0}")]
    Layout(#[from] LayoutError),
    /// The shards are no division of the regions.
    #[error("handshake: shards: {0}")]
    Shards(#[from] ShardsError),
    /// There are not as many shards as userfaultfds.
    #[error(
        "handshake: {shards} shards and {userfaultfds} userfaultfds: \"shards\" has the size of each userfaultfd's part of the \
         regions, in the order of \"descriptors\""
    )]
    ShardCount {
        /// Sizes in `shards`.
        shards: usize,
        /// Userfaultfds among the descriptors.
        userfaultfds: usize,
    },
    /// None came.
    #[error("{form} handshake without a descriptor: its userfaultfd must come with it (SCM_RIGHTS)")]
    NoDescriptor {
        /// Which form.
        form: Form,
    },
    /// Some came, fewer or more than announced.
    #[error("{form} handshake with {got} descriptors; it needs {needed}")]
    Descriptors {
        /// Which form.
        form: Form,
        /// How many came.
        got: usize,
        /// How many there must be.
        needed: usize,
    },
    /// More than any handshake has.
    #[error("{got} descriptors; no handshake has more than {MAX_DESCRIPTORS}")]
    ManyDescriptors {
        /// How many had come.
        got: usize,
    },
    /// Some came, and this process could not take them.
    #[error("descriptors were lost on the way: the pager can open no more; raise its limit (ulimit -n)")]
    DescriptorsLost,
    /// The descriptor in a userfaultfd's place is something else.
    #[error("descriptor {position} is {what}, no userfaultfd")]
    NotUserfaultfd {
        /// Its place among the descriptors, from 0.
        position: usize,
        /// What it is, as /proc has it.
        what: String,
    },
    /// The same userfaultfd came twice.
    #[error("descriptors {first} and {second} are the same userfaultfd: make one for each shard")]
    SameUserfaultfd {
        /// One's place among the descriptors, from 0.
        first: usize,
        /// The other's.
        second: usize,
    },
    /// Reading it could wait for ever, and it cannot be polled.
    #[error("descriptor {position} is a userfaultfd that blocks: make it with O_NONBLOCK")]
    Blocking {
        /// Its place among the descriptors, from 0.
        position: usize,
    },
    /// No range of memory can be registered with it, so that it can have no faults.
    #[error(
        "descriptor {position} is a userfaultfd that was never set up: call UFFDIO_API on it, and register its memory, before sending it"
    )]
    NotSetUp {
        /// Its place among the descriptors, from 0.
        position: usize,
    },
    /// The memory file is none, or cannot be trusted.
    #[error("the memory descriptor: {0}")]
    Memory(#[from] NotSealed),
    /// The memory file cannot be written, and pages are filled by writing it.
    #[error(
        "the memory descriptor cannot be written: open it for reading and writing, and leave F_SEAL_WRITE and F_SEAL_FUTURE_WRITE away"
    )]
    MemoryNotWritable,
    /// The channel is none, or cannot be trusted, or read.
    #[error("the channel descriptor: {0}")]
    Channel(#[from] AttachError),
    /// The bitmap is none, or cannot be trusted.
    #[error("the bitmap descriptor: {0}")]
    Bitmap(#[from] BitmapError),
    /// The page table is none, or cannot be trusted.
    #[error("the pages descriptor: {0}")]
    Pages(#[from] PageTableError),
    /// Another reader has filled pages, and nobody says which.
    #[error(
        "the channel has had a reader before, and what that one has filled is not known: send the page table that it had, as \"pages\" (filled again, pages would lose what the guest wrote)"
    )]
    NoPages,
    /// The eventfd could not be kept.
    #[error("the eventfd descriptor could not be duplicated: {0}")]
    Copy(String),
    /// The memory file cannot be mapped here.
    #[error("the memory descriptor cannot be mapped: {0}")]
    Mapping(#[from] MapError),
    /// Who it is, is not allowed.
    #[error("peers of uid {uid} are not allowed; see --allow-uid")]
    Uid {
        /// The peer's, as the kernel says it (SO_PEERCRED).
        uid: u32,
    },
    /// The source cannot serve it.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The pager takes no new VMs.
    #[error("the pager is draining and takes no new VMs")]
    Draining,
}

/// A reason on its way to a [`Refusal`]: whoever holds the descriptors adds them.
#[derive(Debug)]
pub(super) struct Rejected {
    pub(super) reason: RefusalReason,
    /// In a box: this travels as an error through many calls.
    pub(super) layout: Option<Box<Layout>>,
}

impl<R: Into<RefusalReason>> From<R> for Rejected {
    fn from(reason: R) -> Self {
        Self { reason: reason.into(), layout: None }
    }
}

/// The longest that a log line quotes of what a stranger said, in characters.
const MAX_QUOTED: usize = 160;

/// What a stranger said, fit for a log line: nothing that moves a cursor or starts a line, and not too long.
pub(super) fn one_line(text: &str) -> String {
    let mut line: String =
        text.chars().take(MAX_QUOTED).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(MAX_QUOTED).is_some() {
        line.push('…');
    }
    line
}
