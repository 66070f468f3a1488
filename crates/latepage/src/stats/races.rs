//! loom: a reader of the trace ring never sees an entry of which one half is older than the other.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p latepage --lib --release loom_`.

use loom::sync::Arc;
use loom::thread;

use super::{Reason, TraceRead, TraceRing};

/// Records event number `n` such that each of its fields says so.
fn record(ring: &TraceRing, n: u32) {
    ring.record(n..n + 1, Reason::ALL[n as usize % 5], u64::from(n) * 1000);
}

/// What was read is exactly the events that end at the cursor, each whole.
fn check(read: &TraceRead, from: u64) {
    assert_eq!(from + read.lost + read.entries.len() as u64, read.cursor);
    for (entry, n) in read.entries.iter().zip(from + read.lost..) {
        assert_eq!((u64::from(entry.page), entry.pages), (n, 1));
        assert_eq!(entry.reason, Reason::ALL[n as usize % 5]);
        assert_eq!(entry.ns, n * 1000);
    }
}

/// Reads on from the cursor as often as told, each time what was recorded meanwhile.
fn read(ring: &TraceRing, cursor: u64, times: usize) -> u64 {
    (0..times).fold(cursor, |cursor, _| {
        let read = ring.read_from(cursor);
        check(&read, cursor);
        read.cursor
    })
}

fn read_while_recorded(capacity: usize, events: u32, reads: usize) {
    // Either may be the thread that is spawned: loom looks for other orders only from an access back to the last one.
    for spawn_reader in [false, true] {
        loom::model(move || {
            let ring = Arc::new(TraceRing::new(capacity));
            let shared = Arc::clone(&ring);
            let write = move |ring: &TraceRing| (0..events).for_each(|n| record(ring, n));
            let cursor = if spawn_reader {
                let reader = thread::spawn(move || read(&shared, 0, reads));
                write(&ring);
                reader.join().unwrap()
            } else {
                let writer = thread::spawn(move || write(&shared));
                let cursor = read(&ring, 0, reads);
                writer.join().unwrap();
                cursor
            };
            assert_eq!(read(&ring, cursor, 1), u64::from(events));
        });
    }
}

#[test]
fn loom_no_entry_is_torn_when_each_overwrites_the_last() {
    read_while_recorded(1, 3, 1);
    read_while_recorded(1, 2, 2);
}

#[test]
fn loom_no_entry_is_torn_when_the_recorder_laps_the_reader() {
    read_while_recorded(2, 4, 1);
}

#[test]
fn loom_recorders_that_hand_over_leave_no_gap() {
    loom::model(|| {
        let ring = Arc::new(TraceRing::new(2));
        record(&ring, 0);
        // The gate's hand-over is what orders two recorders; here a spawn and a join stand for it.
        let next = Arc::clone(&ring);
        let second = thread::spawn(move || record(&next, 1));
        check(&ring.read_from(0), 0);
        second.join().unwrap();
        record(&ring, 2);
        let read = ring.read_from(0);
        check(&read, 0);
        assert_eq!((read.lost, read.entries.len()), (1, 2));
    });
}

#[test]
fn loom_recorders_of_a_shared_ring_lose_nothing_of_each_other() {
    loom::model(|| {
        let ring = Arc::new(TraceRing::shared(4));
        let next = Arc::clone(&ring);
        let second = thread::spawn(move || record(&next, 1));
        record(&ring, 0);
        second.join().unwrap();
        let read = ring.read_from(0);
        let mut pages: Vec<u32> = read.entries.iter().map(|entry| entry.page).collect();
        pages.sort_unstable();
        assert_eq!((read.lost, pages), (0, vec![0, 1]));
        assert!(read.entries.iter().all(|entry| entry.ns == u64::from(entry.page) * 1000));
    });
}
