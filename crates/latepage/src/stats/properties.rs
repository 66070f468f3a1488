//! Property tests: histogram quantiles against sorted samples, the trace ring against a queue, and the docs' list of counters
//! against the code's.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::{
    BUCKETS, Counters, Histogram, HistogramSnapshot, Reason, Stats, StatsSnapshot, TraceEntry, TraceRing,
    bucket_range,
};

mod counters {
    use super::*;

    #[test]
    fn the_docs_list_the_counters_that_there_are() {
        let mut table = String::from("| counter | what it counts |\n|---|---|\n");
        for (name, meaning) in Counters::NAMES.into_iter().zip(Counters::MEANINGS) {
            table += &format!("| `{name}` | {meaning} |\n");
        }
        let docs = include_str!("../../../../docs/stats.md");
        assert!(docs.contains(&table), "docs/stats.md should have\n{table}");
    }

    #[test]
    fn a_snapshot_names_every_count() {
        let stats = Stats::new(0);
        stats.counters.faults.add(3);
        stats.counters.reads.add(2);
        let snapshot = stats.snapshot().counters;
        let named: Vec<_> = snapshot.iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(named, [("faults", 3), ("reads", 2)]);
        assert_eq!(snapshot.iter().count(), Counters::NAMES.len());
    }

    #[test]
    fn merged_sessions_count_as_one() {
        let mut total = StatsSnapshot::default();
        for ns in [100, 1_000_000] {
            let stats = Stats::new(0);
            stats.counters.faults.add(2);
            stats.latency.record(ns);
            total.merge(&stats.snapshot());
        }
        assert_eq!(total.counters.faults, 4);
        assert_eq!((total.latency.count, total.latency.sum), (2, 1_000_100));
        assert_eq!(total.latency.max, 1_000_000);
    }
}

mod a_histogram {
    use super::*;

    fn recorded(samples: &[u64]) -> HistogramSnapshot {
        let histogram = Histogram::new();
        samples.iter().for_each(|ns| histogram.record(*ns));
        histogram.snapshot()
    }

    /// Durations of every order of magnitude, the range's ends and beyond.
    fn durations() -> impl Strategy<Value = Vec<u64>> {
        let duration =
            (0..42_u32, any::<u64>()).prop_map(|(power, bits)| (1 << power) | (bits & ((1 << power) - 1)));
        prop::collection::vec(duration, 1..200)
    }

    #[test]
    fn its_buckets_lie_end_to_end_and_are_narrow() {
        let mut next = 128;
        for bucket in 0..BUCKETS {
            let range = bucket_range(bucket);
            assert_eq!(range.start, next);
            assert!((range.end - range.start) * 16 <= range.start);
            for ns in [range.start, range.end - 1] {
                assert_eq!(recorded(&[ns]).buckets[bucket], 1);
            }
            next = range.end;
        }
        assert_eq!(next, 1 << 36);
    }

    #[test]
    fn what_lies_outside_the_range_is_counted_at_its_ends() {
        let snapshot = recorded(&[0, 1 << 40]);
        assert_eq!((snapshot.buckets[0], snapshot.buckets[BUCKETS - 1]), (1, 1));
        assert_eq!(snapshot.quantile(1.0), 1 << 40);
    }

    #[test]
    fn nothing_recorded_has_no_duration() {
        let empty = HistogramSnapshot::default();
        assert_eq!(empty, Histogram::new().snapshot());
        assert_eq!((empty.quantile(0.5), empty.mean()), (0, 0.0));
    }

    proptest! {
        #[test]
        fn its_quantiles_are_at_most_a_sixteenth_above_the_sample(
            mut samples in durations(),
            q in 0.0..=1.0_f64,
        ) {
            let snapshot = recorded(&samples);
            samples.sort_unstable();
            let rank = ((q * samples.len() as f64).ceil() as usize).clamp(1, samples.len());
            let exact = samples[rank - 1];
            let said = snapshot.quantile(q);
            let longest = samples[samples.len() - 1];
            prop_assert!(said >= exact.min(1 << 36), "{said} understates {exact}");
            prop_assert!(said <= longest);
            if exact < 1 << 36 {
                // A sample in the last bucket is answered with the longest, which may lie beyond the range.
                let last = bucket_range(BUCKETS - 1).start;
                prop_assert!(exact >= last || said <= (exact + exact / 16).max(135), "{said} overstates {exact}");
            }
        }

        #[test]
        fn merging_is_recording_in_one(first in durations(), second in durations()) {
            let mut merged = recorded(&first);
            merged.merge(&recorded(&second));
            let together = recorded(&[first, second].concat());
            prop_assert_eq!(&merged, &together);
            prop_assert_eq!(merged.count, merged.buckets.iter().sum::<u64>());
        }
    }
}

mod a_trace_ring {
    use super::*;

    #[derive(Debug, Clone)]
    enum Act {
        Record(TraceEntry),
        /// One of two readers, each with a cursor of its own, reads on.
        Read(usize),
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        // No table has so many pages that a run of them would end beyond 32 bits.
        let pages = 1..=TraceEntry::MOST_PAGES;
        let entry = (0..u32::MAX >> 1, pages, prop::sample::select(&Reason::ALL[..]), any::<u64>())
            .prop_map(|(page, pages, reason, ns)| TraceEntry { page, pages, reason, ns });
        let act = prop_oneof![
            5 => entry.prop_map(Act::Record),
            1 => (0..2_usize).prop_map(Act::Read),
        ];
        prop::collection::vec(act, 0..100)
    }

    #[test]
    fn takes_sixteen_bytes_an_entry_and_none_when_it_is_off() {
        assert_eq!(size_of::<[u64; 2]>(), 16);
        let off = TraceRing::new(0);
        off.record(1..2, Reason::Demand, 2);
        assert_eq!((off.capacity(), off.recorded()), (0, 0));
        assert!(off.read_from(0).entries.is_empty());
    }

    #[test]
    fn a_cursor_from_elsewhere_is_set_back_to_the_newest() {
        let ring = TraceRing::new(4);
        ring.record(1..2, Reason::Demand, 2);
        let read = ring.read_from(u64::MAX);
        assert_eq!((read.entries.len(), read.cursor, read.lost), (0, 1, 0));
    }

    #[test]
    fn a_run_that_is_too_long_for_an_entry_takes_two_and_none_takes_none() {
        let (ring, most) = (TraceRing::new(4), TraceEntry::MOST_PAGES);
        ring.record(7..7, Reason::Removed, 1);
        ring.record(7..most + 9, Reason::Removed, 2);
        let entry = |page, pages| TraceEntry { page, pages, reason: Reason::Removed, ns: 2 };
        assert_eq!(ring.read_from(0).entries, [entry(7, most), entry(most + 7, 2)]);
    }

    proptest! {
        #[test]
        fn keeps_the_newest_in_order_and_counts_the_lost(capacity in 0..9_usize, acts in acts()) {
            let ring = TraceRing::new(capacity);
            let mut kept = VecDeque::new();
            let mut recorded = 0_u64;
            let mut cursors = [0_u64; 2];
            for act in acts {
                match act {
                    Act::Record(entry) => {
                        ring.record(entry.page..entry.page + entry.pages, entry.reason, entry.ns);
                        if capacity > 0 {
                            recorded += 1;
                            kept.push_back(entry);
                            if kept.len() > capacity {
                                kept.pop_front();
                            }
                        }
                    }
                    Act::Read(reader) => {
                        let read = ring.read_from(cursors[reader]);
                        let unread = (recorded - cursors[reader]) as usize;
                        let there = unread.min(kept.len());
                        let expected: Vec<TraceEntry> = kept.iter().skip(kept.len() - there).copied().collect();
                        prop_assert_eq!(read.entries, expected);
                        prop_assert_eq!(read.lost as usize, unread - there);
                        prop_assert_eq!(read.cursor, recorded);
                        cursors[reader] = read.cursor;
                    }
                }
            }
            prop_assert_eq!(ring.recorded(), recorded);
        }
    }
}
