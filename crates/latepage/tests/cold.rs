//! Memory files that are not in the page cache: read by io_uring, or by threads where there is none, and right in both ways.

mod vmm;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use latepage::attachment::Backing;
use latepage::pager::{Config, What};
use latepage::session::{FaultAround, Policy};
use latepage::source::FileSource;
use vmm::PAGE;
use vmm::guest::Guest;
use vmm::serving::{Directory, Serving, policy, populating};
use vmm::snapshot::word;

/// A memory file of so many pages, on the disk and nowhere else if that is to be had.
struct Cold {
    file: File,
    path: PathBuf,
    _directory: Directory,
}

impl Cold {
    fn new(pages: usize) -> Self {
        let directory = Directory::new();
        let path = directory.file("memory");
        let mut file = File::create(&path).unwrap();
        let words = (0..(pages * PAGE) as u64).step_by(8).map(|offset| word(offset, 0));
        file.write_all(&words.flat_map(u64::to_ne_bytes).collect::<Vec<u8>>()).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let cold = Self { file: File::open(&path).unwrap(), path, _directory: directory };
        cold.cool();
        cold
    }

    fn cool(&self) {
        rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }

    fn serve(&self, io_uring: bool, policy: Policy) -> Serving {
        let source = Arc::new(FileSource::open(&self.path).unwrap());
        self.cool();
        let config = Config { workers: Some(1), io_uring: Some(io_uring), ..Config::default() };
        Serving::with(config, source, policy)
    }
}

fn scattered() -> Policy {
    Policy { fault_around: FaultAround::Auto, ..policy() }
}

#[test]
fn a_cold_file_is_right_by_io_uring_and_by_threads_whoever_populates() {
    need_userfaultfd!();
    let cold = Cold::new(2048);
    for io_uring in [true, false] {
        for policy in [scattered(), policy(), populating()] {
            let serving = cold.serve(io_uring, policy);
            let guests = [Backing::Anonymous, Backing::Shared].map(|backing| Guest::new(backing, 2048));
            let _sockets = guests.each_ref().map(|guest| guest.connect(&serving.socket, "vm"));
            let verified = guests.each_ref().map(|guest| guest.verify(7, |offset| word(offset, 0)));
            for wrong in verified {
                assert_eq!(wrong.join(), [0; 0]);
            }
            let counters = serving.pager.totals().counters;
            assert_eq!(counters.failures, 0);
            assert!(counters.ring_reads + counters.shared_reads <= counters.later);
            assert!(counters.ring_reads == 0 || io_uring);
        }
    }
}

#[test]
fn what_faults_wait_for_is_read_by_io_uring_where_it_is_allowed() {
    need_userfaultfd!();
    let cold = Cold::new(2048);
    let mut serving = cold.serve(true, scattered());
    if !serving.pager.reads_by_ring() {
        let told = serving
            .ever("warning", |what| matches!(what, What::Warning { what } if what.starts_with("io_uring")));
        eprintln!("skipped: {told:?}");
        return;
    }
    assert!(serving.pager.fallbacks().is_empty());
    let guest = Guest::new(Backing::Anonymous, 2048);
    let _socket = guest.connect(&serving.socket, "vm");
    assert_eq!(guest.touch(2000).join(), word(2000 * PAGE as u64, 0));
    let counters = serving.session("vm").stats().counters.snapshot();
    if counters.later == 0 {
        eprintln!("skipped: {} stays in memory", cold.path.display());
        return;
    }
    assert_eq!((counters.later, counters.ring_reads, counters.shared_reads), (1, 1, 0));
}
