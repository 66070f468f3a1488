"""What a session did: counters, how long its faults waited, and which pages came in when and why."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Latency", "Reason", "Stats", "TraceEntry"]

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
class Stats:
    """One session's figures, read at one moment.

    Attributes:
        counters: each counter by name (docs/stats.md lists them).
        latency: how long its faults waited.
    """

    counters: dict[str, int]
    latency: Latency

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
    """One page that came in, or was discarded.

    Attributes:
        page: its index in the session.
        reason: why.
        seconds: when, since the session began.
    """

    page: int
    reason: Reason
    seconds: float
