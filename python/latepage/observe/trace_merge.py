"""What several runs of one VM touched, as one order: to bring its memory in that order the next time."""

import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from latepage.errors import TraceError
from latepage.observe import trace_format as form
from latepage.observe.trace_diff import check_fit
from latepage.observe.trace_file import MergedTrace, Trace
from latepage.observe.trace_writer import encode_end

__all__ = ["merge", "replacing", "write_merged"]


def merge(traces: Sequence[Trace], *, min_runs: int = 1) -> MergedTrace:
    """One order for the pages that were touched in any of the runs.

    A page stands where its earliest first touch in any run puts it, counted from the start of that run's session; pages of the
    same moment stand by their number. Only touches count: what came beside them or ahead of them is no sign of use.

    Args:
        traces: at least one; of VMs with the same memory.
        min_runs: leave out pages that fewer runs touched.

    Raises:
        TraceError: there is none, or the memory of one is laid out differently.
    """
    if not traces:
        raise TraceError("nothing to merge: give at least one trace")
    earliest: dict[int, float] = {}
    runs: dict[int, int] = {}
    for trace in traces:
        check_fit(traces[0], trace)
        for page, seconds in trace.touches().items():
            earliest[page] = min(seconds, earliest.get(page, seconds))
            runs[page] = runs.get(page, 0) + 1
    order = sorted((page for page in runs if runs[page] >= min_runs), key=lambda page: (earliest[page], page))
    return MergedTrace(
        path=None,
        regions=traces[0].regions,
        merged=tuple((trace.vm, trace.started) for trace in traces),
        pages=array("I", order),
        touched_by=array("I", (runs[page] for page in order)),
        seconds=array("d", (earliest[page] for page in order)),
    )


def write_merged(path: str | os.PathLike[str], merged: MergedTrace) -> None:
    """Writes a merged trace to a file; one that is there is replaced, at once and only by a whole one.

    Raises:
        TraceError: the file cannot be written.
    """
    fields = {
        "merged": [{"vm": vm, "started": started} for vm, started in merged.merged],
        "regions": form.regions_as_json(merged.regions),
    }
    data = bytearray(form.header(form.KIND_MERGED, fields))
    for page, runs, seconds in zip(merged.pages, merged.touched_by, merged.seconds, strict=True):
        data += form.RECORD.pack(page, form.MERGED << 24 | runs - 1, round(seconds * 1e9))
    data += encode_end({}, len(merged.pages), zlib.crc32(data))
    with replacing(Path(path)) as part:
        part.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when it is complete, and is gone if it does not come to that.

    Raises:
        TraceError: it cannot be written.
    """
    try:
        part = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
        part.touch(exist_ok=False)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error.strerror or error}", call="write", errno=error.errno) from None
