//! All that a pager is handed of a VM: the one place that holds its descriptors, for as long as anybody may wait for a page.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use latepage::attachment::{Backing, native};
use latepage::delivery::channel::Channel;
use latepage::memory::Layout;
use latepage::sys::fdpass;
use latepage::sys::uffd::Userfaultfd;

/// See the module.
#[derive(Debug)]
pub(crate) struct Handover {
    /// The regions, with their addresses in this process.
    pub(crate) layout: Layout,
    /// Where threads post and wait.
    pub(crate) channel: Channel,
    /// The memory file.
    pub(crate) memory: OwnedFd,
    /// The bits of its pages, if these make an access come back.
    pub(crate) bitmap: Option<OwnedFd>,
    /// What has become of each page, as pagers note it: the next one knows what is there.
    pub(crate) pages: OwnedFd,
    /// Over the guest view. Were the pager's the only one, its death would let whoever waits there through to zeros.
    pub(crate) userfaultfd: Arc<Userfaultfd>,
    /// Whether the pager gets it too. If not, this process exposes every page.
    pub(crate) hands_userfaultfd: bool,
    /// What the VM is called.
    pub(crate) name: String,
    /// How many vCPUs it has.
    pub(crate) vcpus: u32,
}

impl Handover {
    /// Introduces the VM to the pager at the other end, and sends it everything.
    pub(crate) fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let introduction = native::Introduction {
            name: Some(&self.name),
            vcpus: self.vcpus,
            backing: Backing::Shared,
            memory: true,
            layout: &self.layout,
        };
        let beside = native::BesideChannel {
            bitmap: self.bitmap.is_some(),
            pages: true,
            userfaultfd: self.hands_userfaultfd,
        };
        let message = native::message_with_channel(&introduction, beside);
        let (channel, bell) = self.channel.descriptors();
        let mut descriptors = vec![channel, bell, self.memory.as_fd()];
        descriptors.extend(self.bitmap.as_ref().map(AsFd::as_fd));
        descriptors.push(self.pages.as_fd());
        descriptors.extend(self.hands_userfaultfd.then(|| self.userfaultfd.as_fd()));
        let sent = fdpass::send(socket, message.as_bytes(), &descriptors)?;
        if sent < message.len() {
            let why = "the handshake did not fit into the socket's buffer";
            return Err(io::Error::new(io::ErrorKind::WriteZero, why));
        }
        Ok(())
    }
}
