//! Where the pager holds no userfaultfd: threads of the VMM read it, and post what they read. KVM's own accesses come that way, and
//! the VMM's through the guest view.
//!
//! Each forwarder has a seat of its own and one fault at a time: it posts, waits, exposes the page in the guest view, and takes the
//! next. Faults beyond their number wait in the userfaultfd.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use latepage::sys::uffd::{Message, MessageBuffer};
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;

use crate::control::Control;
use crate::error::VmError;

use super::seat::{Missing, Seat};

/// How many there are.
pub(super) const FORWARDERS: u32 = 4;

/// The threads. They end when the value is dropped.
#[derive(Debug)]
pub(super) struct Forwarders {
    leave: Arc<AtomicBool>,
    stop: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Forwarders {
    /// Starts a thread for each seat. A page that cannot be had fails the VM.
    pub(super) fn start(seats: Vec<Seat>, control: &Arc<Control>) -> Result<Self, VmError> {
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|errno| VmError::call("eventfd", errno))?;
        let mut started = Self { leave: Arc::default(), stop: Arc::new(stop), threads: Vec::new() };
        for (number, mut seat) in seats.into_iter().enumerate() {
            let (leave, stop) = (Arc::clone(&started.leave), Arc::clone(&started.stop));
            let control = Arc::clone(control);
            let thread = thread::Builder::new().name(format!("forward-{number}")).spawn(move || {
                if let Err(errno) = forward(&mut seat, &stop, &leave, &control) {
                    control.cannot_go_on(format!("the userfaultfd cannot be read any more: {errno}"));
                }
            });
            started.threads.push(thread.map_err(|source| VmError::thread(&source))?);
        }
        Ok(started)
    }
}

fn forward(seat: &mut Seat, stop: &OwnedFd, leave: &AtomicBool, control: &Control) -> Result<(), Errno> {
    let userfaultfd = seat.userfaultfd();
    let mut one = MessageBuffer::new(1);
    loop {
        let mut polled =
            [PollFd::new(stop, PollFlags::IN), PollFd::from_borrowed_fd(userfaultfd.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        if !polled[0].revents().is_empty() {
            return Ok(());
        }
        // All of them wake for one fault, and all but one find none.
        userfaultfd.read(&mut one)?;
        for message in one.drain() {
            let Message::PageFault { address, .. } = message else { continue };
            match seat.forward(address, leave) {
                Ok(()) => {}
                Err(Missing::Left) => return Ok(()),
                Err(missing) => control.cannot_go_on(format!(
                    "the memory at {address:#x} of the VMM could not be had: {missing}"
                )),
            }
        }
    }
}

/// When nobody touches the memory any more.
impl Drop for Forwarders {
    fn drop(&mut self) {
        self.leave.store(true, Ordering::Release);
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
