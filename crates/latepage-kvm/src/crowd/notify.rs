//! The delivery `notify`: the thread that touched a page posts it to a pager, which fills; the thread exposes what was filled.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use latepage::attachment::native;
use latepage::delivery::channel::{Channel, Completion, Request, Waited};
use latepage::install::{Install, Stop};
use latepage::sys::uffd::Features;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::memory::{Memory, connect};
use super::touch::touch_trapping;
use super::{Crowd, CrowdReport};
use crate::error::VmError;

/// After so long a thread looks whether the pager is there: one that refused the VM, or died, wakes nobody.
const PATIENCE: Duration = Duration::from_secs(1);
const GONE: &[u8] =
    b"the pager closed the connection while pages were waited for: it refused the VM, or ended\n";

/// Whether the pager has closed its end. It may be asked in a signal handler.
fn has_gone(socket: &UnixStream) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
    match rustix::event::poll(&mut polled, Some(&Timespec::default())) {
        Ok(ready) => ready > 0,
        Err(errno) => errno != Errno::INTR,
    }
}

pub(super) fn run(crowd: &Crowd, socket: &Path) -> Result<CrowdReport, VmError> {
    let memory = Memory::absent(crowd, Features::SIGBUS)?;
    let install = &memory.install()?;
    let channel =
        Channel::new(crowd.threads, crowd.pages).map_err(|error| VmError::Config(error.to_string()))?;
    let message = native::message_with_channel(&memory.introduction(crowd), native::BesideChannel::default());
    let (shared, bell) = channel.descriptors();
    let socket = &connect(socket, &message, &[shared, bell, memory.file.as_fd()])?;
    let layout = &memory.layout;
    touch_trapping(crowd, &memory.view, |number| {
        let mut seat = channel.seat(number).expect("each thread has a slot of its own");
        move |address| {
            let Some(page) = layout.find_hva(address) else { return false };
            if seat.post(&Request::Fault { page, write: false, thread: number }).is_err() {
                return false;
            }
            let filled = loop {
                match seat.wait(crowd.spins, Some(PATIENCE)) {
                    Waited::Over(Completion::Done(pages)) => break pages,
                    Waited::TimedOut if has_gone(socket) => {
                        // Its access cannot go on: the signal ends the process, and this says why.
                        let _ = rustix::io::write(std::io::stderr(), GONE);
                        return false;
                    }
                    Waited::Interrupted | Waited::TimedOut => {}
                    Waited::Over(_) | Waited::Garbled => return false,
                }
            };
            let mut at = filled.start;
            while at < filled.end {
                let outcome = install.expose(layout, at..filled.end);
                at += outcome.pages;
                match outcome.stopped {
                    None => {}
                    Some(Stop::AlreadyThere) => at += 1,
                    // The mapping changes: the access tries again, and comes back here.
                    Some(Stop::Busy) => break,
                    Some(_) => return false,
                }
            }
            true
        }
    })
}
