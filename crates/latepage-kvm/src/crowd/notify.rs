//! The delivery `notify`: the thread that touched a page posts it to a pager, which fills; the thread exposes what was filled.

use std::os::fd::AsFd;
use std::path::Path;

use latepage::attachment::native;
use latepage::delivery::channel::{Channel, Completion, Request, Waited};
use latepage::install::{Install, Stop};
use latepage::sys::uffd::Features;

use super::memory::{Memory, connect};
use super::touch::touch_trapping;
use super::{Crowd, CrowdReport};
use crate::error::VmError;

pub(super) fn run(crowd: &Crowd, socket: &Path) -> Result<CrowdReport, VmError> {
    let memory = Memory::absent(crowd, Features::SIGBUS)?;
    let install = &memory.install()?;
    let channel =
        Channel::new(crowd.threads, crowd.pages).map_err(|error| VmError::Config(error.to_string()))?;
    let message = native::message_with_channel(&memory.introduction(crowd), native::BesideChannel::default());
    let (shared, bell) = channel.descriptors();
    let _socket = connect(socket, &message, &[shared, bell, memory.file.as_fd()])?;
    let layout = &memory.layout;
    touch_trapping(crowd, &memory.view, |number| {
        let mut seat = channel.seat(number).expect("each thread has a slot of its own");
        move |address| {
            let Some(page) = layout.find_hva(address) else { return false };
            if seat.post(&Request::Fault { page, write: false, thread: number }).is_err() {
                return false;
            }
            let filled = loop {
                match seat.wait(crowd.spins, None) {
                    Waited::Over(Completion::Done(pages)) => break pages,
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
