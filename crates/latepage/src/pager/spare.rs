//! Descriptors kept free for what peers send: one that finds no room is lost without a trace, and with it a VM.

use std::os::fd::OwnedFd;

use rustix::event::EventfdFlags;
use rustix::io::Errno;

use crate::attachment::MAX_DESCRIPTORS;

/// More than a good handshake brings, and than is opened to look at it.
const KEPT: usize = MAX_DESCRIPTORS + 5;

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
            let another = match self.0.first() {
                // Another place in the table, and nothing else.
                Some(first) => rustix::io::fcntl_dupfd_cloexec(first, 0)?,
                None => rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?,
            };
            self.0.push(another);
        }
        Ok(())
    }

    /// Makes room for what is received next.
    pub(super) fn make_room(&mut self) {
        self.0.clear();
    }
}
