"""The bytes of trace files. docs/trace.md gives them one by one, and says what a reader may rely on."""

import json
import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any, Final

from latepage.errors import TraceError
from latepage.memory import Region

__all__ = [
    "CHECKSUM",
    "END",
    "FRONT",
    "KIND_MERGED",
    "KIND_TRACE",
    "LOST",
    "MAGIC",
    "MERGED",
    "MOST_TEXT",
    "REASONS",
    "RECORD",
    "TOUCHES",
    "VERSION",
    "Fields",
    "header",
    "parse_object",
    "parse_regions",
    "regions_as_json",
    "trouble",
]

MAGIC: Final = b"\x89LPT\r\n\x1a\n"
VERSION: Final = 1
KIND_TRACE: Final = 1
KIND_MERGED: Final = 2

FRONT: Final = struct.Struct("<8sHHI")
"""Magic, version, kind of file, length of the header's text."""
CHECKSUM: Final = struct.Struct("<I")
RECORD: Final = struct.Struct("<IIQ")
"""First page; pages - 1 in 24 bits, and what it is in the 8 above them; ns since the session began."""

REASONS: Final = {1: "demand", 2: "beside", 3: "population", 4: "removed", 5: "cleared"}
"""What a record of pages is, by its number in the file."""
TOUCHES: Final = (1, 5)
"""Those of a single page."""
MERGED: Final = 0x10
LOST: Final = 0xF0
END: Final = 0xFF

MOST_TEXT: Final = 4 << 20
"""Bytes of a text in a file, at most: what is longer was not written by us."""

Fields = Mapping[str, Any]


def header(kind: int, fields: Fields) -> bytes:
    """All that stands before the first record, which begins at a multiple of 16 bytes."""
    text = json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
    text += b" " * (-(FRONT.size + len(text) + CHECKSUM.size) % RECORD.size)
    front = FRONT.pack(MAGIC, VERSION, kind, len(text)) + text
    return front + CHECKSUM.pack(zlib.crc32(front))


def regions_as_json(regions: tuple[Region, ...]) -> list[dict[str, int | None]]:
    """Regions as a header has them."""
    names = ("gpa", "hva", "size", "offset", "page_size")
    return [{name: getattr(region, name) for name in names} for region in regions]


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object of which every number is finite.

    Raises:
        ValueError: it is none.
    """

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no number")

    def finite(text: str) -> float:
        return number if math.isfinite(number := float(text)) else refuse(text)

    try:
        found = json.loads(text.decode(), parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return found


def parse_regions(fields: Fields) -> tuple[Region, ...]:
    """The regions of a header.

    Raises:
        ValueError: they are no layout.
    """
    listed = fields.get("regions")
    if not isinstance(listed, list) or not listed:
        raise ValueError("it has no regions")
    regions = tuple(_region(entry) for entry in listed)
    if sum(region.pages for region in regions) >= 1 << 32:
        raise ValueError("its regions have more pages than there can be")
    return regions


def _region(entry: object) -> Region:
    if not isinstance(entry, dict):
        raise ValueError("a region is no object")
    numbers = {name: entry.get(name) for name in ("gpa", "hva", "size", "offset", "page_size")}
    gpa = numbers.pop("gpa")
    for name, number in numbers.items():
        _whole(name, number)
    if gpa is not None:
        _whole("gpa", gpa)
    region = Region(gpa=gpa, **numbers)  # type: ignore[arg-type]  # each was looked at above
    if region.page_size not in (4096, 2 << 20) or not region.size or region.size % region.page_size:
        raise ValueError(f"a region of {region.size} bytes in pages of {region.page_size}")
    return region


def _whole(name: str, number: object) -> None:
    if type(number) is not int or not 0 <= number < 1 << 64:
        raise ValueError(f"{name} is {str(number)[:40]}")


def trouble(path: object, offset: int, what: str) -> TraceError:
    """The error for a place in a file."""
    return TraceError(f"{path}: byte {offset:,}: {what}", call="read")
