//! Accesses that no exit reports: KVM's own, and the VMM's through the guest view. They come by userfaultfd.

use std::os::fd::{AsFd, BorrowedFd};

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
    /// the guest view itself in no other way. Where accesses are signals, all that is left to do is to have the source look after
    /// itself.
    ///
    /// # Errors
    /// The errno of poll(2) or of reading the userfaultfd.
    pub fn serve(&mut self, stop: BorrowedFd<'_>, mut tell: impl FnMut(Told)) -> Result<(), Errno> {
        let uffd = self.resolver.messages.clone();
        let mut delivery = uffd.clone().map(UffdDelivery::new);
        let mut batch = Batch::new(MESSAGES);
        loop {
            let messages = uffd.as_ref().map_or(stop, |uffd| uffd.as_fd());
            let mut polled = [
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::from_borrowed_fd(messages, PollFlags::IN),
            ];
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
            let Some(delivery) = &mut delivery else { continue };
            batch.clear();
            delivery.take(&self.resolver.layout, &mut batch).map_err(|error| error.errno)?;
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
