"""Traces as values: one VM's, and what several runs of it have in common. docs/trace.md has the files' format."""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

from latepage.errors import TraceError
from latepage.memory import Region
from latepage.observe import trace_format as form
from latepage.observe.trace_reader import Contents, read_contents
from latepage.stats import Reason, TraceEntry

__all__ = ["MergedTrace", "Run", "Trace", "places", "ranges", "read_any", "read_merged", "read_trace"]


class Run(NamedTuple):
    """Pages that follow one another and came, or went, at the same moment for the same reason.

    Attributes:
        page: the first one's index in the session.
        pages: how many; a touch is a run of one.
        reason: why.
        seconds: when, since the session began.
    """

    page: int
    pages: int
    reason: Reason
    seconds: float


@dataclass(frozen=True, slots=True)
class Trace:
    """One VM's trace.

    Attributes:
        path: the file that it was read from.
        vm: the VM's name.
        source: what its memory came from.
        started: when its session began, in seconds since 1970.
        regions: its memory; pages are numbered region after region.
        populate: whether its policy brought pages that nobody had asked for: `none` or `background`.
        fault_around: bytes of the window around a touched page whose pages came with it.
        records: what happened, 16 bytes each, as they stand in the file; `runs` gives them as values.
        lost: entries that came faster than they could be recorded, and are missing.
        whole: whether the recording came to its end. Where not, the pager was killed, its disk was full, or it still records.
        readable: bytes of the file that could be read.
        end: how the session ended: `gone`, `detached`, `closed`, or `stopped` where only the recording did; None if not whole.
        seconds: from the start of the session to the end of the recording, or to the last record where it is not whole.
        counters: the session's counters at the end (docs/stats.md); empty if not whole.
        latency: how long its faults waited: `p50`, `p99`, `max` and `mean` in seconds, and their `count`; empty if not whole.
    """

    path: Path
    vm: str
    source: str
    started: float
    regions: tuple[Region, ...]
    populate: str
    fault_around: int
    records: bytes
    lost: int
    whole: bool
    readable: int
    end: str | None
    seconds: float
    counters: dict[str, int]
    latency: dict[str, float]

    @property
    def pages(self) -> int:
        """How many pages its memory has."""
        return sum(region.pages for region in self.regions)

    @property
    def size(self) -> int:
        """Bytes of its memory."""
        return sum(region.size for region in self.regions)

    def runs(self) -> Iterator[Run]:
        """What happened, in its order."""
        for page, what, ns in form.RECORD.iter_unpack(self.records):
            if (reason := form.REASONS.get(what >> 24)) is not None:
                yield Run(page, (what & 0xFFFFFF) + 1, cast("Reason", reason), ns / 1e9)

    def touches(self) -> dict[int, float]:
        """The pages that the guest touched, in the order in which it did, and when it first touched each: its working set.

        What was brought in beside a touched page, or ahead of any touch, is not among them, and neither is a page that was
        touched after the VM had discarded it: that needed nothing of the snapshot.
        """
        found: dict[int, float] = {}
        for run in self.runs():
            if run.reason == "demand":
                found.setdefault(run.page, run.seconds)
        return found

    @property
    def populated(self) -> bool:
        """Whether population brought any page: what the guest touched of those does not show."""
        return any(run.reason == "population" for run in self.runs())

    def spans(self, pages: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Where pages lie in the VM's memory, its regions put end to end, and how large each is, in bytes."""
        firsts = places(self.regions)
        starts = [0, *accumulate(region.size for region in self.regions)]
        for page in pages:
            at = bisect_right(firsts, page) - 1
            unit = self.regions[at].page_size
            yield starts[at] + (page - firsts[at]) * unit, unit

    def arrivals(self) -> Iterator[TraceEntry]:
        """The entry with which each page came in for the first time; discards are left out."""
        seen = set()
        for run in self.runs():
            if run.reason != "removed":
                for page in range(run.page, run.page + run.pages):
                    if page not in seen:
                        seen.add(page)
                        yield TraceEntry(page, run.reason, run.seconds)


@dataclass(frozen=True, slots=True)
class MergedTrace:
    """What several runs of one VM were seen to touch: each page once, in the order of its earliest first touch in any run.

    Attributes:
        path: the file that it was read from; None if it was made just now.
        regions: the VM's memory.
        merged: what it was made of: names of VMs and when their sessions began, in seconds since 1970.
        pages: the pages, by their index in the session.
        touched_by: how many runs were seen to touch each of them; more may have.
        seconds: when the first run to do so first touched each of them, since that run's first touch of all.
        granule: bytes of the stretches of memory within which a touch of a run may have hidden others, by what came beside it;
            0 if unknown.
        populated: whether population brought pages to any run: what the guest touched of those does not show.
    """

    path: Path | None
    regions: tuple[Region, ...]
    merged: tuple[tuple[str, float], ...]
    pages: "array[int]"
    touched_by: "array[int]"
    seconds: "array[float]"
    granule: int = 0
    populated: bool = False

    def ranges(self) -> list[tuple[int, int]]:
        """The pages as ranges of the snapshot, offset and size in bytes, in their order: what `Session.populate` takes."""
        return ranges(self.regions, self.pages)


def places(regions: tuple[Region, ...]) -> list[int]:
    """The index of each region's first page, and at the end the number of pages.

    >>> places((Region(None, 0, 8192, 0, 4096), Region(None, 8192, 4096, 8192, 4096)))
    [0, 2, 3]
    """
    return [0, *accumulate(region.pages for region in regions)]


def ranges(regions: tuple[Region, ...], pages: Iterable[int]) -> list[tuple[int, int]]:
    """Pages as ranges of the snapshot, offset and size in bytes, in the order given; neighbours become one range.

    >>> ranges((Region(None, 0, 1 << 20, 0, 4096),), [7, 8, 3])
    [(28672, 8192), (12288, 4096)]
    """
    firsts = places(regions)
    found: list[tuple[int, int]] = []
    for page in pages:
        at = bisect_right(firsts, page) - 1
        region = regions[at]
        offset = region.offset + (page - firsts[at]) * region.page_size
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + region.page_size)
        else:
            found.append((offset, region.page_size))
    return found


def read_any(path: str | PathLike[str]) -> Trace | MergedTrace:
    """Reads a file that a pager recorded, or that `latepage trace merge` wrote.

    Raises:
        TraceError: it is none of them, of another version, or damaged. The message names the file and the byte.
    """
    contents = read_contents(path := Path(path))
    return (_trace if contents.kind == form.KIND_TRACE else _merged)(path, contents)


def read_trace(path: str | PathLike[str]) -> Trace:
    """Reads a file that a pager recorded, as far as it goes: `whole` says whether it is all there.

    Raises:
        TraceError: it is no trace, of another version, or damaged. The message names the file and the byte.
    """
    found = read_any(path)
    if isinstance(found, MergedTrace):
        raise TraceError(f"{path}: byte 10: made of several traces by `trace merge`; name a trace of one VM")
    return found


def read_merged(path: str | PathLike[str]) -> MergedTrace:
    """Reads a file that `latepage trace merge` wrote.

    Raises:
        TraceError: it is none, of another version, damaged, or not whole. The message names the file and the byte.
    """
    found = read_any(path)
    if isinstance(found, Trace):
        raise TraceError(f"{path}: byte 10: the trace of one VM; name a file that `trace merge` wrote")
    return found


def _trace(path: Path, contents: Contents) -> Trace:
    fields, end = contents.header, contents.end
    lost, newest = 0, 0
    for page, what, ns in form.RECORD.iter_unpack(contents.records):
        newest = max(newest, ns)
        if what >> 24 == form.LOST:
            lost += page | (what & 0xFFFFFF) << 32
    ended = end or {}
    return Trace(
        path=path,
        vm=_text(fields.get("vm")),
        source=_text(fields.get("source")),
        started=_number(fields.get("started")),
        regions=contents.regions,
        populate=_text(fields.get("populate")),
        fault_around=int(_number(fields.get("fault_around"))),
        records=contents.records,
        lost=lost,
        whole=end is not None,
        readable=contents.readable,
        end=None if end is None else _text(ended.get("end")),
        seconds=max(newest / 1e9, _number(ended.get("seconds"))),
        counters={name: int(number) for name, number in _numbers(ended.get("counters")).items()},
        latency=_numbers(ended.get("latency")),
    )


def _merged(path: Path, contents: Contents) -> MergedTrace:
    if contents.end is None:
        raise form.trouble(path, contents.readable, "the file ends here, before its end mark; merge the traces again")
    merged = MergedTrace(
        path,
        contents.regions,
        _runs(contents.header.get("merged")),
        array("I"),
        array("I"),
        array("d"),
        granule=int(_number(contents.header.get("granule"))),
        populated=contents.header.get("populated") is True,
    )
    for page, what, ns in form.RECORD.iter_unpack(contents.records):
        merged.pages.append(page)
        merged.touched_by.append((what & 0xFFFFFF) + 1)
        merged.seconds.append(ns / 1e9)
    return merged


def _runs(listed: object) -> tuple[tuple[str, float], ...]:
    entries = listed if isinstance(listed, list) else []
    return tuple((_text(entry.get("vm")), _number(entry.get("started"))) for entry in entries if isinstance(entry, dict))


def _text(value: object) -> str:
    """Text that can be printed: a file may hold anything, sequences that steer a terminal among it."""
    text = value if isinstance(value, str) else "?"
    return "".join(character if character.isprintable() else "?" for character in text)


def _number(value: object) -> float:
    """A number that is no nonsense: what is not one, or below zero, is 0."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e18 else 0.0


def _numbers(value: object) -> dict[str, float]:
    entries: dict[Any, Any] = value if isinstance(value, dict) else {}
    return {_text(name): _number(number) for name, number in entries.items()}
