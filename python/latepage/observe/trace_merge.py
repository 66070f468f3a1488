"""What several runs of one VM touched, as one order: to bring its memory in that order the next time."""

import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from latepage.errors import TraceError
from latepage.observe import trace_format as form
from latepage.observe.trace_diff import check_fit, common_granule
from latepage.observe.trace_file import MergedTrace, Trace
from latepage.observe.trace_writer import MODE, encode_end

__all__ = ["merge", "replacing", "write_merged"]


def merge(traces: Sequence[Trace], *, min_runs: int = 1) -> MergedTrace:
    """One order for the pages that were touched in any of the runs.

    A page stands where its earliest first touch in any run puts it, counted from that run's first touch of all: a VM may be
    restored long before it runs. Pages of the same moment stand by their number. Only touches count: what came beside them or
    ahead of them is no sign of use, and may have been used unseen.

    Args:
        traces: at least one; of VMs with the same memory.
        min_runs: leave out pages that fewer runs were seen to touch.

    Raises:
        TraceError: there is none, or the memory of one is laid out differently.
    """
    if not traces:
        raise TraceError("nothing to merge: give at least one trace")
    earliest: dict[int, float] = {}
    runs: dict[int, int] = {}
    for trace in traces:
        check_fit(traces[0], trace)
        touches = trace.touches()
        began = min(touches.values(), default=0.0)
        for page, moment in touches.items():
            seconds = moment - began
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
        granule=common_granule(traces),
        populated=any(trace.populated for trace in traces),
    )


def write_merged(path: str | os.PathLike[str], merged: MergedTrace) -> None:
    """Writes a merged trace to a file; one that is there is replaced, at once and only by a whole one.

    Raises:
        TraceError: the file cannot be written.
    """
    fields = {
        "merged": [{"vm": vm, "started": started} for vm, started in merged.merged],
        "regions": form.regions_as_json(merged.regions),
        "granule": merged.granule,
        "populated": merged.populated,
    }
    data = bytearray(form.header(form.KIND_MERGED, fields))
    for page, runs, seconds in zip(merged.pages, merged.touched_by, merged.seconds, strict=True):
        data += form.RECORD.pack(page, form.MERGED << 24 | runs - 1, round(seconds * 1e9))
    data += encode_end({}, len(merged.pages), zlib.crc32(data))
    with replacing(Path(path), MODE) as part:
        part.write_bytes(data)


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A file beside `path` that takes its place when it is complete, and is gone if it does not come to that.

    Args:
        path: the place.
        mode: its permissions, less those that the umask takes away.

    Raises:
        TraceError: it cannot be written.
    """
    try:
        part = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
        part.touch(mode, exist_ok=False)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error.strerror or error}", call="write", errno=error.errno) from None
