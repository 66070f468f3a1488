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
    let introduction = memory.introduction(crowd);
    let message = match memory.shards.len() {
        1 => native::message(&introduction),
        _ => native::message_with_shards(&introduction, &memory.shards),
    };
    let mut descriptors: Vec<_> = memory.uffds.iter().map(|uffd| uffd.as_fd()).collect();
    descriptors.push(memory.file.as_fd());
    let _socket = connect(socket, &message, &descriptors)?;
    touch_all(crowd, &memory.view, |_, work| work())
}
