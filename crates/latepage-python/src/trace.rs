//! Traces as bytes: the records of a trace file (docs/trace.md), so that Python need not handle single entries.

use latepage::stats::TraceEntry;

/// Bytes of a record.
const RECORD: usize = 16;

/// Entries as records, in their order.
pub(crate) fn records(entries: &[TraceEntry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(entries.len() * RECORD);
    for entry in entries {
        // 0 is no reason in a file, so that what was never written cannot be taken for a record.
        let reason = entry.reason as u32 + 1;
        bytes.extend(entry.page.to_le_bytes());
        bytes.extend(((entry.pages - 1) | reason << 24).to_le_bytes());
        bytes.extend(entry.ns.to_le_bytes());
    }
    bytes
}
