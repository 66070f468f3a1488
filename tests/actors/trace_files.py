"""Trace files, made byte by byte."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latepage.memory import Region
from latepage.observe import trace_format as form
from latepage.observe.trace_writer import encode_end

REGION = Region(gpa=0, hva=0x7F00_0000_0000, size=1 << 20, offset=0, page_size=4096)
"""256 pages."""

NUMBERS = {name: number for number, name in form.REASONS.items()}

Record = tuple[int, int, str, int]
"""First page, pages, reason, ns."""


def record(page: int, pages: int, reason: str, ns: int) -> bytes:
    return form.RECORD.pack(page, pages - 1 | NUMBERS[reason] << 24, ns)


def header(vm: str = "vm-7", regions: tuple[Region, ...] = (REGION,), **more: Any) -> bytes:
    fields = {"vm": vm, "source": "guest.mem", "started": 1e9, "regions": form.regions_as_json(regions), **more}
    return form.header(form.KIND_TRACE, fields)


def trace_bytes(records: Sequence[Record], *, end: bool = True, lost: int = 0, **about: Any) -> bytes:
    data = header(**about) + b"".join(record(*fields) for fields in records)
    count = len(records)
    if lost:
        data += form.RECORD.pack(lost, form.LOST << 24, 5)
        count += 1
    fields = {
        "end": "gone",
        "seconds": 2.5,
        "lost": lost,
        "counters": {"faults": count},
        "latency": {"p50": 1e-6, "count": count},
    }
    return data + encode_end(fields, count, zlib.crc32(data)) if end else data


def write_trace(path: Path, records: Sequence[Record], **about: Any) -> Path:
    path.write_bytes(trace_bytes(records, **about))
    return path
