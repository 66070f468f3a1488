//! One connection's handshake, as it arrives.

use std::mem;
use std::os::fd::OwnedFd;

use crate::memory::{Layout, Shards};
use crate::sys::uffd::Userfaultfd;

use super::assemble::{Parts, put_together};
use super::places::Places;
use super::refusal::{Refusal, RefusalReason, Rejected};
use super::scan::Scanner;
use super::{Form, Hello, firecracker, native};

/// The longest handshake, in bytes.
pub const MAX_BODY: usize = 1 << 20;

/// The most descriptors that a handshake has: a userfaultfd for each shard, and the memory file. One message can carry 253.
pub const MAX_DESCRIPTORS: usize = Shards::MOST + 1;

/// The deepest nesting of a handshake's JSON. The forms need three; keys that we ignore may need some.
pub const MAX_NESTING: usize = 32;

/// What has become of a handshake with the bytes that came.
// One per connection, and moved once.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub enum Fed {
    /// It is not whole yet.
    More,
    /// It was understood, and checked.
    Done(Hello),
    /// The peer is refused.
    Refused(Refusal),
}

/// A handshake that is arriving. No I/O in it: whoever reads the socket hands it what came.
///
/// A descriptor may come with any part, before or after the JSON that announces it, and parts may be empty.
#[derive(Debug, Default)]
pub struct Incoming {
    scanner: Scanner,
    body: Vec<u8>,
    received: usize,
    descriptors: Vec<OwnedFd>,
    announced: Option<Announced>,
    finished: bool,
}

/// The document, once it is whole and understood.
#[derive(Debug)]
enum Announced {
    Firecracker(Layout),
    Latepage(native::Announcement),
}

impl Announced {
    fn form(&self) -> Form {
        match self {
            Self::Firecracker(_) => Form::Firecracker,
            Self::Latepage(_) => Form::Latepage,
        }
    }

    fn descriptors(&self) -> usize {
        match self {
            Self::Firecracker(_) => 1,
            Self::Latepage(announcement) => announcement.places.count(),
        }
    }

    fn into_layout(self) -> Layout {
        match self {
            Self::Firecracker(layout) => layout,
            Self::Latepage(announcement) => announcement.layout,
        }
    }
}

impl Incoming {
    /// A connection on which nothing has arrived.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes that have arrived.
    pub fn received(&self) -> usize {
        self.received
    }

    /// Takes what one recvmsg(2) brought. Once it has answered other than [`Fed::More`] there is nothing more to feed:
    /// whatever comes is refused.
    pub fn feed(&mut self, bytes: &[u8], descriptors: Vec<OwnedFd>) -> Fed {
        // First of all: whatever happens next, a userfaultfd among them must not be closed.
        self.descriptors.extend(descriptors);
        self.received = self.received.saturating_add(bytes.len());
        match self.take(bytes) {
            Ok(None) => Fed::More,
            Ok(Some(hello)) => {
                self.finished = true;
                Fed::Done(hello)
            }
            Err(reason) => Fed::Refused(self.refuse(reason)),
        }
    }

    /// The peer has closed its end, or died, before its handshake was whole.
    pub fn closed(mut self) -> Refusal {
        let reason = match (self.lacking(), self.received, self.descriptors.len()) {
            (Some(reason), ..) => reason,
            (None, 0, 0) => RefusalReason::Silent,
            (None, bytes, _) => RefusalReason::Incomplete { bytes },
        };
        self.refuse(reason.into())
    }

    /// The time for a handshake is over.
    pub fn timed_out(mut self) -> Refusal {
        let late = RefusalReason::Late { bytes: self.received, descriptors: self.descriptors.len() };
        let reason = self.lacking().unwrap_or(late);
        self.refuse(reason.into())
    }

    /// Refuses it for a reason that lies elsewhere: its uid, a pager that takes no new VMs.
    pub fn refused(mut self, reason: RefusalReason) -> Refusal {
        self.refuse(reason.into())
    }

    fn take(&mut self, bytes: &[u8]) -> Result<Option<Hello>, Rejected> {
        if self.finished {
            return Err(RefusalReason::Trailing { bytes: bytes.len() }.into());
        }
        self.read(bytes)?;
        let Some(announced) = &self.announced else {
            if self.descriptors.len() > MAX_DESCRIPTORS {
                return Err(RefusalReason::ManyDescriptors { got: self.descriptors.len() }.into());
            }
            return Ok(None);
        };
        let (got, needed) = (self.descriptors.len(), announced.descriptors());
        if got < needed {
            return Ok(None);
        }
        if got > needed {
            return Err(RefusalReason::Descriptors { form: announced.form(), got, needed }.into());
        }
        self.assemble().map(Some)
    }

    /// Takes bytes, and parses the document when its end has come.
    fn read(&mut self, bytes: &[u8]) -> Result<(), Rejected> {
        if self.received > MAX_BODY {
            return Err(RefusalReason::Huge.into());
        }
        let scanned = self.scanner.feed(bytes);
        if self.announced.is_none() {
            self.body.extend_from_slice(bytes);
        }
        scanned?;
        if self.announced.is_some() || !self.scanner.is_closed() {
            return Ok(());
        }
        let body = mem::take(&mut self.body);
        self.announced = match self.scanner.form() {
            Some(Form::Firecracker) => Some(Announced::Firecracker(firecracker::parse(&body)?)),
            Some(Form::Latepage) => Some(Announced::Latepage(native::parse(&body)?)),
            None => None,
        };
        Ok(())
    }

    /// Puts descriptors and document together. There are as many descriptors as it needs.
    fn assemble(&mut self) -> Result<Hello, Rejected> {
        let Some(announced) = &self.announced else {
            unreachable!("the descriptors were counted against the document")
        };
        let one = Places::of_one_userfaultfd();
        let (places, layout, vcpus) = match announced {
            Announced::Firecracker(layout) => (&one, layout, 1),
            Announced::Latepage(announcement) => {
                (&announcement.places, &announcement.layout, announcement.vcpus)
            }
        };
        let Parts { userfaultfds, memory, notify } =
            put_together(&mut self.descriptors, places, layout, vcpus)?;
        Ok(match self.announced.take().expect("looked at above") {
            Announced::Firecracker(layout) => Hello {
                form: Form::Firecracker,
                name: None,
                vcpus,
                backing: firecracker::backing(&layout),
                shards: Shards::whole(&layout),
                layout,
                userfaultfds,
                memory,
                notify,
            },
            Announced::Latepage(announcement) => Hello {
                form: Form::Latepage,
                name: announcement.name,
                vcpus,
                backing: announcement.backing,
                layout: announcement.layout,
                shards: announcement.shards,
                userfaultfds,
                memory,
                notify,
            },
        })
    }

    /// If the document is whole, what else is missing.
    fn lacking(&self) -> Option<RefusalReason> {
        let announced = self.announced.as_ref()?;
        let form = announced.form();
        Some(match self.descriptors.len() {
            0 => RefusalReason::NoDescriptor { form },
            got => RefusalReason::Descriptors { form, got, needed: announced.descriptors() },
        })
    }

    fn refuse(&mut self, rejected: Rejected) -> Refusal {
        self.finished = true;
        let descriptors = mem::take(&mut self.descriptors);
        Refusal {
            reason: rejected.reason,
            userfaultfds: descriptors.into_iter().filter_map(|fd| Userfaultfd::from_fd(fd).ok()).collect(),
            layout: rejected
                .layout
                .map(|layout| *layout)
                .or_else(|| self.announced.take().map(Announced::into_layout)),
        }
    }
}
