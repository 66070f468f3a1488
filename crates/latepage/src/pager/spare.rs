//! Descriptors kept free for what peers send: one that finds no room is lost without a trace, and with it a VM.

use std::os::fd::OwnedFd;

use rustix::event::EventfdFlags;
use rustix::io::Errno;

/// More than a good handshake brings, and than is opened to look at it.
const KEPT: usize = 10;

/// Places in this process's table of descriptors.
#[derive(Debug, Default)]
pub(super) struct Spare(Vec<OwnedFd>);

impl Spare {
    /// Takes what is missing.
    ///
    /// # Errors
    /// EMFILE or ENFILE: there is no room. Nothing may be received then.
    pub(super) fn fill(&mut self) -> Result<(), Errno> {
        while self.0.len() < KEPT {
            self.0.push(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?);
        }
        Ok(())
    }

    /// Makes room for what is received next.
    pub(super) fn make_room(&mut self) {
        self.0.clear();
    }
}
