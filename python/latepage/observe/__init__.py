"""What was measured, as files and pictures: traces of which page came in when and why, and their plots."""

from latepage.errors import TraceError
from latepage.observe.recorder import RING, Recorder
from latepage.observe.trace_diff import Difference, compare
from latepage.observe.trace_file import MergedTrace, Run, Trace, read_any, read_merged, read_trace
from latepage.observe.trace_merge import merge, write_merged
from latepage.observe.trace_summary import Summary, summarize

__all__ = [
    "RING",
    "Difference",
    "MergedTrace",
    "Recorder",
    "Run",
    "Summary",
    "Trace",
    "TraceError",
    "compare",
    "merge",
    "read_any",
    "read_merged",
    "read_trace",
    "summarize",
    "write_merged",
]
