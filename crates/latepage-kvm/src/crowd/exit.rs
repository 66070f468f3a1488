//! The delivery `exit`: the thread that touched a page brings it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use latepage::session::exit::Exits;
use latepage::source::{FileSource, Source};
use latepage::sys::uffd::Features;

use super::memory::Memory;
use super::touch::touch_trapping;
use super::{Crowd, CrowdReport};
use crate::error::VmError;

const PAGE: usize = 4096;

pub(super) fn run(crowd: &Crowd, memory_file: &Path) -> Result<CrowdReport, VmError> {
    let memory = Memory::absent(crowd, Features::SIGBUS)?;
    let source = FileSource::open(memory_file)
        .map_err(|error| VmError::LateMemory { path: memory_file.to_path_buf(), why: error.to_string() })?;
    wait_until_looked_at(&source, crowd.pages);
    let install = Box::new(memory.install()?);
    let exits = &Exits::new(memory.layout.clone(), Arc::new(source), install, PAGE as u64);
    touch_trapping(crowd, &memory.view, |number| {
        let mut buffer = vec![0; PAGE];
        move |address| {
            let page = exits.layout().find_hva(address);
            page.is_some_and(|page| exits.resolve(page, number as usize, &mut buffer).is_ok())
        }
    })
}

/// A source that was just opened finds out first what of its file is in memory, once. No more than a second is waited for that.
fn wait_until_looked_at(source: &FileSource, pages: u32) {
    let (began, last) = (Instant::now(), u64::from(pages - 1) * PAGE as u64);
    while source.at_hand(last, PAGE, PAGE).is_none() && began.elapsed() < Duration::from_secs(1) {
        std::thread::yield_now();
    }
}
