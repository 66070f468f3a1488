//! The crowd that `latepage bench scale` measures: every thread sees what the memory file holds. How fast, no test says.

mod machines;

use std::fs;
use std::path::PathBuf;

use latepage::sys::uffd::Userfaultfd;
use latepage_kvm::crowd::channel::ChannelSteps;
use latepage_kvm::crowd::{Crowd, CrowdDelivery, word_at};

use machines::{Scratch, scratch};

const PAGES: u32 = 512;

fn available() -> bool {
    Userfaultfd::offered().inspect_err(|why| eprintln!("skipped: no userfaultfd: {why}")).is_ok()
}

fn memory_file(scratch: &Scratch) -> PathBuf {
    let path = scratch.path().join("memory");
    let words: Vec<u8> = (0..u64::from(PAGES) * 512).flat_map(|n| word_at(n).to_ne_bytes()).collect();
    fs::write(&path, words).unwrap();
    path
}

fn crowd(delivery: CrowdDelivery) -> Crowd {
    Crowd {
        delivery,
        threads: 16,
        pages: PAGES,
        touches: PAGES,
        seed: 7,
        shards: 1,
        socket: None,
        memory_file: None,
        spins: 0,
    }
}

#[test]
fn threads_that_bring_their_own_pages_see_what_the_file_holds() {
    if !available() {
        return;
    }
    let scratch = scratch();
    let report =
        Crowd { memory_file: Some(memory_file(&scratch)), ..crowd(CrowdDelivery::Exit) }.run().unwrap();
    assert_eq!((report.touches, report.wrong), (PAGES as usize, 0));
    assert!(report.p50 <= report.p99 && report.p99 <= report.ns);
}

#[test]
fn a_page_that_is_not_as_the_file_should_be_counts_as_wrong() {
    if !available() {
        return;
    }
    let scratch = scratch();
    let path = scratch.path().join("memory");
    fs::write(&path, vec![1; PAGES as usize * 4096]).unwrap();
    let report = Crowd { memory_file: Some(path), ..crowd(CrowdDelivery::Exit) }.run().unwrap();
    assert_eq!(report.wrong, u64::from(PAGES));
}

#[test]
fn what_a_crowd_cannot_do_is_refused_before_a_thread_starts() {
    let few = Crowd { touches: 15, ..crowd(CrowdDelivery::Exit) };
    assert!(few.run().unwrap_err().to_string().contains("15 touches by 16 threads"));
    let none = Crowd { threads: 0, ..crowd(CrowdDelivery::Exit) };
    assert!(none.run().unwrap_err().to_string().contains("1 to 4096"));
    let shards = Crowd { shards: 2, ..crowd(CrowdDelivery::Exit) };
    assert!(shards.run().unwrap_err().to_string().contains("go with the delivery uffd"));
    assert!(crowd(CrowdDelivery::Notify).run().unwrap_err().to_string().contains("takes a socket"));
    assert!(crowd(CrowdDelivery::Exit).run().unwrap_err().to_string().contains("takes a memory_file"));
}

#[test]
fn the_steps_of_the_channel_are_those_of_the_whole() {
    if !available() {
        return;
    }
    for spins in [0, 1000] {
        let steps = ChannelSteps { pages: 64, owner_spins: spins, reader_spins: spins, cores: None };
        let times = steps.run().unwrap();
        assert!(times.post > 0 && times.install > 0 && times.release > 0 && times.expose > 0, "{times:?}");
        // Each page's whole is longer than any step of it.
        assert!(
            [times.post, times.install, times.release, times.expose].iter().all(|step| *step < times.all),
            "{times:?}"
        );
    }
    let elsewhere = ChannelSteps { pages: 1, owner_spins: 0, reader_spins: 0, cores: Some((5000, 5000)) };
    assert!(elsewhere.run().unwrap_err().to_string().contains("may not run there"));
}
