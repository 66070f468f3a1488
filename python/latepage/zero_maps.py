"""Which pages of a memory file are zero though they are data: looked at once, and kept. docs/scan.md has the format."""

import os
from dataclasses import dataclass
from pathlib import Path

from latepage import _core

__all__ = ["Scan", "folder", "scan"]


@dataclass(frozen=True, slots=True)
class Scan:
    """What a memory file holds, in pages of 4 KiB.

    Attributes:
        pages: all of them.
        holes: those that lie in holes.
        zeros: those that are data, and zero all the same.
        map: the zero map that was written; None where there is none.
        why: why there is none; None where there is one.
        told: what else there is to say, a line each: no read lease, a map that was not believed.
    """

    pages: int
    holes: int
    zeros: int
    map: Path | None
    why: str | None
    told: tuple[str, ...]


def folder() -> Path | None:
    """Where zero maps are kept: `latepage/zero` in the user's cache folder.

    That is `CACHE_DIRECTORY`, which systemd gives to a unit, `XDG_CACHE_HOME`, or `.cache` in the user's home, by `HOME` or else
    by the user database. None where there is nothing of that.
    """
    for name in ("CACHE_DIRECTORY", "XDG_CACHE_HOME"):
        given = os.environ.get(name, "").partition(":")[0]
        # The standard has paths that are not absolute ignored.
        if given.startswith("/"):
            return Path(given) / "latepage" / "zero"
    home = os.path.expanduser("~")  # noqa: PTH111 (Path.home raises where there is none)
    return Path(home) / ".cache" / "latepage" / "zero" if home.startswith("/") else None


def scan(memory: str | os.PathLike[str]) -> Scan:
    """Looks at every page of a memory file, and keeps what it found.

    What was not in the page cache does not stay there.

    Raises:
        SourceError: it is missing, unreadable, empty, no regular file, or was written to meanwhile.
    """
    maps = folder()
    pages, holes, zeros, place, why, told = _core.scan_file(os.fspath(memory), None if maps is None else os.fspath(maps))
    if maps is None:
        why = "there is no cache folder: set XDG_CACHE_HOME"
    return Scan(pages, holes, zeros, None if place is None else Path(place), why, tuple(told))
