//! Accesses that no exit reports: KVM's own, and the VMM's through the guest view. They come by userfaultfd.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::{Seat, Unresolved};
use crate::delivery::{Batch, Delivery, UffdDelivery};
use crate::source::SourceNotice;

/// Messages taken at a time.
const MESSAGES: usize = 64;
/// How often the source looks after itself.
const SECOND: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// What a thread that serves has to tell.
#[derive(Debug)]
pub enum Told {
    /// A page cannot be had. Who wanted it gets an error in place of it, where the kernel knows poison (Linux 6.6), and waits elsewhere:
    /// the VM must not go on.
    Unresolved(Unresolved),
    /// The source has something to say.
    Source(SourceNotice),
}

impl Seat {
    /// Serves the userfaultfd until `stop` is readable. One thread of the VMM does so for as long as the VM lives, and touches
    /// the guest view itself in no other way.
    ///
    /// # Errors
    /// The errno of poll(2) or of reading the userfaultfd.
    pub fn serve(&mut self, stop: BorrowedFd<'_>, mut tell: impl FnMut(Told)) -> Result<(), Errno> {
        let uffd = Arc::clone(&self.resolver.uffd);
        let mut delivery = UffdDelivery::new(Arc::clone(&uffd));
        let mut batch = Batch::new(MESSAGES);
        loop {
            let mut polled =
                [PollFd::new(&stop, PollFlags::IN), PollFd::from_borrowed_fd(uffd.as_fd(), PollFlags::IN)];
            match rustix::event::poll(&mut polled, Some(&SECOND)) {
                Ok(0) => {
                    self.resolver.source.check().into_iter().for_each(|notice| tell(Told::Source(notice)))
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
            if !polled[0].revents().is_empty() {
                return Ok(());
            }
            let resolver = Arc::clone(&self.resolver);
            batch.clear();
            delivery.take(&resolver.layout, &mut batch).map_err(|error| error.errno)?;
            self.desk().faults.add(batch.faults.len() as u64);
            for fault in &batch.faults {
                match self.resolve(fault.page) {
                    Ok(true) => {}
                    // Whoever brings it releases who waits at the userfaultfd, too.
                    Ok(false) => self.desk().joined.add(1),
                    Err(unresolved) => tell(Told::Unresolved(unresolved)),
                }
            }
            // Nobody asked for events, and only the regions are registered.
            debug_assert!(batch.surprises.is_empty(), "{:?}", batch.surprises);
        }
    }
}
