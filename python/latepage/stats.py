"""What a session did: counters, how long its faults waited, and which pages came in when and why."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from latepage import _core

if TYPE_CHECKING:
    from latepage._core import _Stats

__all__ = ["FaultResult", "Histogram", "Latency", "PageClass", "Reason", "Stats", "TraceEntry", "from_engine"]

PageClass = Literal["source", "zero", "resident", "unknown"]
"""What kind of page a fault met: contents from the source, zero, one that the guest had already, or nobody got to know."""

FaultResult = Literal["installed", "deferred", "present", "discarded", "failed"]
"""What came of a fault: installed at once or after a wait, there already, discarded while it waited, or not to be had."""

Reason = Literal["demand", "beside", "population", "removed", "cleared"]
"""Why a page stands in the trace: docs/stats.md tells what each means."""


@dataclass(frozen=True, slots=True)
class Latency:
    """How long faults waited, from the moment the kernel delivered them to us until their thread was released.

    Every figure is in seconds; quantiles are exact to about 6 %, the width of the histogram's buckets.

    Attributes:
        count: how many faults.
        mean: the mean.
        p50: half of them waited no longer.
        p99: 99 of 100 waited no longer.
        max: the longest wait.
    """

    count: int
    mean: float
    p50: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """How long some faults waited, in few numbers that can be added up.

    Attributes:
        cumulative: pairs of an upper bound in seconds and of how many faults waited no longer; each bound is twice the one
            before, from 2^10 ns (1.024 µs) to 2^36 ns (68.7 s).
        count: how many faults there were, the longest waits too.
        sum: seconds that they waited, together.
    """

    cumulative: tuple[tuple[float, int], ...]
    count: int
    sum: float


@dataclass(frozen=True, slots=True)
class Stats:
    """The figures of one session, or of all that a pager ever served, read at one moment.

    Attributes:
        counters: each counter by name (docs/stats.md lists them).
        latency: how long faults waited.
        faults_by: the same, apart by page class and result; every combination that can occur is there.
    """

    counters: dict[str, int]
    latency: Latency
    faults_by: dict[tuple[PageClass, FaultResult], Histogram]

    @property
    def faults(self) -> int:
        """How many faults were delivered."""
        return self.counters["faults"]

    @property
    def bytes_installed(self) -> int:
        """How many bytes of guest memory were installed, zero pages included."""
        return self.counters["bytes_installed"]


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """Pages that came in, or were discarded, together.

    Attributes:
        page: the first one's index in the session.
        reason: why.
        seconds: when, since the session began.
        pages: how many, `page` and those that follow it directly; what was touched is one page.
    """

    page: int
    reason: Reason
    seconds: float
    pages: int = 1


def from_engine(fields: "_Stats") -> Stats:
    """The engine's plain figures, with their types and in seconds."""
    counters, (count, mean, p50, p99, longest), classes = fields
    bounds = [ns / 1e9 for ns in _core.LATENCY_BOUNDS]
    return Stats(
        counters=counters,
        latency=Latency(count, mean / 1e9, p50 / 1e9, p99 / 1e9, longest / 1e9),
        faults_by={
            cast("tuple[PageClass, FaultResult]", (of, result)): Histogram(
                tuple(zip(bounds, cumulative, strict=True)), faults, total / 1e9
            )
            for of, result, cumulative, faults, total in classes
        },
    )
