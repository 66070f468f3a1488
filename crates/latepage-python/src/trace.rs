//! Traces as bytes: the records of a trace file (docs/trace.md), so that Python need not handle single entries.

use latepage::stats::{Reason, TraceEntry};

/// Bytes of a record.
const RECORD: usize = 16;
/// A record's run has 24 bits.
const LONGEST_RUN: u32 = 1 << 24;

/// A record: pages that follow one another and came, or went, at the same moment for the same reason.
#[derive(Clone, Copy)]
struct Run {
    first: TraceEntry,
    pages: u32,
}

impl Run {
    /// Whether an entry goes on where this ends. A touch is a record of its own.
    fn takes(self, next: &TraceEntry) -> bool {
        self.first.reason == next.reason
            && self.first.ns == next.ns
            && matches!(next.reason, Reason::Beside | Reason::Population | Reason::Removed)
            && self.pages < LONGEST_RUN
            && self.first.page.checked_add(self.pages) == Some(next.page)
    }

    fn record(self) -> [u8; RECORD] {
        // 0 is no reason in a file, so that what was never written cannot be taken for a record.
        let reason = self.first.reason as u32 + 1;
        let mut record = [0; RECORD];
        record[..4].copy_from_slice(&self.first.page.to_le_bytes());
        record[4..8].copy_from_slice(&((self.pages - 1) | reason << 24).to_le_bytes());
        record[8..].copy_from_slice(&self.first.ns.to_le_bytes());
        record
    }
}

/// Entries as records, in their order.
pub(crate) fn records(entries: &[TraceEntry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut last: Option<Run> = None;
    for entry in entries {
        match &mut last {
            Some(run) if run.takes(entry) => run.pages += 1,
            _ => {
                bytes.extend(last.into_iter().flat_map(Run::record));
                last = Some(Run { first: *entry, pages: 1 });
            }
        }
    }
    bytes.extend(last.into_iter().flat_map(Run::record));
    bytes
}
