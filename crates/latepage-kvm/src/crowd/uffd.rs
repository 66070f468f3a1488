//! The delivery `uffd`: the kernel queues, a pager reads.

use std::os::fd::AsFd;
use std::path::Path;

use latepage::attachment::native;
use latepage::sys::uffd::Features;

use super::memory::{Memory, connect};
use super::touch::touch_all;
use super::{Crowd, CrowdReport};
use crate::error::VmError;

pub(super) fn run(crowd: &Crowd, socket: &Path) -> Result<CrowdReport, VmError> {
    let memory = Memory::absent(crowd, Features::EVENT_REMOVE)?;
    let message = native::message(&memory.introduction(crowd));
    let _socket = connect(socket, &message, &[memory.uffd.as_fd(), memory.file.as_fd()])?;
    touch_all(crowd, &memory.view, |_, work| work())
}
