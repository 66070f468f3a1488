//! The delivery `exit`: the thread that touched a page brings it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use latepage::session::{FaultWindow, Resolver, ResolverError};
use latepage::source::{FileSource, Source};

use super::memory::untouched;
use super::touch::touch_trapping;
use super::{Crowd, CrowdReport};
use crate::error::VmError;

const PAGE: usize = 4096;

pub(super) fn run(crowd: &Crowd, memory_file: &Path) -> Result<CrowdReport, VmError> {
    let (view, _file, layout) = untouched(crowd)?;
    let refused = |why: String| VmError::LateMemory { path: memory_file.to_path_buf(), why };
    let source = FileSource::open(memory_file).map_err(|error| refused(error.to_string()))?;
    wait_until_looked_at(&source, crowd.pages);
    let (source, seats) = (Arc::new(source), crowd.threads as usize);
    let resolver =
        Resolver::by_signal(layout, source, seats, FaultWindow::default()).map_err(|error| match error {
            ResolverError::Userfaultfd(error) => VmError::Userfaultfd(error),
            ResolverError::Register(error) => VmError::Register(error),
            error => refused(error.to_string()),
        })?;
    touch_trapping(crowd, &view, |number| {
        let mut seat = resolver.seat(number as usize).expect("each thread has a number of its own");
        move |address| seat.touch(address).is_ok()
    })
}

/// A source that was just opened finds out first what of its file is in memory, once. No more than a second is waited for that.
fn wait_until_looked_at(source: &FileSource, pages: u32) {
    let (began, last) = (Instant::now(), u64::from(pages - 1) * PAGE as u64);
    while source.at_hand(last, PAGE, PAGE).is_none() && began.elapsed() < Duration::from_secs(1) {
        std::thread::yield_now();
    }
}
