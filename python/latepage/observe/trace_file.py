"""A VM's trace as a file of JSON lines: first one about the VM, then its pages in the order in which they came."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latepage.events import Detached, Ended, Event
from latepage.pager import Pager
from latepage.session import Session
from latepage.stats import TraceEntry

__all__ = ["Trace", "TraceFiles", "read_trace", "write_trace"]


@dataclass(frozen=True, slots=True)
class Trace:
    """A session's trace, and the figures that its session ended with.

    Attributes:
        vm: the VM's name.
        pages: how many pages its memory has.
        counters: its counters at the end (docs/stats.md).
        latency: how long its faults waited: `p50`, `p99`, `max` and `mean` in seconds, and their `count`.
        entries: its pages in the order in which they came in.
    """

    vm: str
    pages: int
    counters: dict[str, int]
    latency: dict[str, float]
    entries: list[TraceEntry]

    def arrivals(self) -> Iterator[TraceEntry]:
        """The entry with which each page came in for the first time; discards are left out.

        >>> first, again = TraceEntry(7, "demand", 0.1), TraceEntry(7, "cleared", 0.3)
        >>> gone = TraceEntry(7, "removed", 0.2)
        >>> list(Trace("vm-7", 8, {}, {}, [first, gone, again]).arrivals()) == [first]
        True
        """
        seen = set()
        for entry in self.entries:
            if entry.reason != "removed" and entry.page not in seen:
                seen.add(entry.page)
                yield entry


def write_trace(path: Path, session: Session) -> None:
    """Writes what is known of a session into a file."""
    entries, _ = session.trace()
    stats = session.stats
    about: dict[str, Any] = {
        "vm": session.name,
        "pages": sum(region.pages for region in session.regions),
        "counters": stats.counters,
        "latency": {name: getattr(stats.latency, name) for name in ("count", "mean", "p50", "p99", "max")},
    }
    with path.open("w") as file:
        file.write(json.dumps(about) + "\n")
        for entry in entries:
            file.write(f'{{"page": {entry.page}, "reason": "{entry.reason}", "seconds": {entry.seconds:.9f}}}\n')


def read_trace(path: Path) -> Trace:
    """Reads a file that `write_trace` wrote."""
    with path.open() as file:
        about = json.loads(file.readline())
        entries = [TraceEntry(**json.loads(line)) for line in file]
    return Trace(entries=entries, **about)


class TraceFiles:
    """Writes `VM.trace` into a folder when that VM's session is over."""

    def __init__(self, pager: Pager, folder: Path) -> None:
        self._pager = pager
        self._folder = folder
        self._open: dict[str, Session] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def watch(self, event: Event) -> None:
        """Keeps up with the sessions that begin and end."""
        # Whoever is there, not only whom the event names: that one may be gone before its event is read.
        for live in self._pager.sessions():
            self._open.setdefault(live.name, live)
        if isinstance(event, Ended | Detached) and (session := self._open.pop(event.vm, None)):
            # A name is a stranger's choice: it must not choose the folder.
            write_trace(self._folder / (session.name.replace("/", "_").lstrip(".") + ".trace"), session)
