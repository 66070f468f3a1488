"""Guest memory: regions, page sizes, and how sizes are written."""

import re
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["PAGE", "PageState", "Region", "format_size", "parse_size"]

PAGE = 4096
"""Bytes of a small page."""

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


@dataclass(frozen=True, slots=True)
class Region:
    """One range of guest memory: where the guest, the VMM's process and the snapshot have it.

    Attributes:
        gpa: guest-physical address, or None where the VMM did not say.
        hva: address in the VMM's process.
        size: bytes.
        offset: where its contents begin in the snapshot, in bytes.
        page_size: bytes of a page: 4096, or 2 MiB with hugetlbfs.
    """

    gpa: int | None
    hva: int
    size: int
    offset: int
    page_size: int

    @property
    def pages(self) -> int:
        """How many pages it has.

        >>> Region(gpa=0, hva=0x7F0000000000, size=1 << 20, offset=0, page_size=4096).pages
        256
        """
        return self.size // self.page_size


class PageState(IntEnum):
    """What is known of one page (the meaning of each is in docs/pages.md).

    >>> PageState(3).name
    'PRESENT'
    """

    ABSENT = 0
    IN_FLIGHT = 1
    FILLED = 2
    PRESENT = 3
    REMOVED = 4
    CLEARING = 5
    FAILED = 6


def parse_size(text: str) -> int:
    """Bytes from a number with a binary unit.

    >>> parse_size("64KiB"), parse_size("1.5 GiB"), parse_size("4096")
    (65536, 1610612736, 4096)

    Raises:
        ValueError: it is not a whole number of bytes, or the unit is not one of KiB, MiB, GiB, TiB.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]iB)?", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no size: write it like 4096, 64KiB, 256MiB or 1GiB")
    size = float(found[1]) * _UNITS[found[2] or ""]
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """A size as a person reads it.

    >>> format_size(65536), format_size(1610612736), format_size(1000), format_size(0)
    ('64 KiB', '1.5 GiB', '1000 B', '0 B')
    """
    for unit, scale in reversed(_UNITS.items()):
        if unit and size >= scale:
            return f"{size / scale:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size} B"
