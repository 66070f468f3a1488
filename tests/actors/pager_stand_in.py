"""A pager that says what a test wants: for what reads pagers and needs no VM."""

from dataclasses import dataclass, field
from typing import cast

from latepage import Fallback, Pager, Region
from latepage.events import Event
from latepage.observe.metrics import COUNTERS
from latepage.session import Progress, Session
from latepage.source import Source
from latepage.stats import Histogram, Latency, Stats

BOUNDS = tuple((1 << power) / 1e9 for power in range(10, 37))


def some_stats(**counters: int) -> Stats:
    """Counters as given, else 0, and one fault of 10 µs from the source."""
    fast = Histogram(tuple((bound, int(bound >= 10e-6)) for bound in BOUNDS), 1, 10e-6)
    none = Histogram(tuple((bound, 0) for bound in BOUNDS), 0, 0.0)
    return Stats(
        counters=dict.fromkeys(COUNTERS, 0) | counters,
        latency=Latency(1, 10e-6, 10e-6, 10e-6, 10e-6),
        faults_by={("source", "installed"): fast, ("unknown", "failed"): none},
    )


@dataclass
class SessionStandIn:
    """A VM of `total` pages, of which `present` have come."""

    name: str = "vm-7"
    total: int = 8
    present: int = 2
    pid: int = 4242
    form: str = "latepage"
    backing: str = "shared"
    vcpus: int = 1
    age: float = 1.5
    closed: bool = False
    stats: Stats = field(default_factory=lambda: some_stats(faults=2))

    @property
    def regions(self) -> tuple[Region, ...]:
        return (Region(gpa=None, hva=0x7F0000000000, size=self.total << 12, offset=0, page_size=4096),)

    @property
    def progress(self) -> Progress:
        return Progress(total=self.total, present=self.present, removed=0, failed=0, lacking=self.total - self.present)

    def pages(self) -> bytes:
        return bytes([3] * self.present + [0] * (self.total - self.present))


@dataclass
class PagerStandIn:
    """Stands where a pager stands."""

    served: list[SessionStandIn] = field(default_factory=list)
    stats: Stats = field(default_factory=some_stats)
    ready: bool = True
    sockets: dict[str, Source] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)
    workers: list[str] = field(default_factory=lambda: ["block", "core"])
    cold_reads: str = "io_uring"
    fallbacks: list[Fallback] = field(default_factory=list)

    @property
    def events_told(self) -> dict[str, int]:
        return {kind.event: 0 for kind in Event.__subclasses__()} | self.told

    def sessions(self) -> list[Session]:
        return [cast("Session", session) for session in self.served]

    def session(self, name: str) -> Session:
        for session in self.sessions():
            if session.name == name:
                return session
        raise KeyError(name)

    def as_pager(self) -> Pager:
        return cast("Pager", self)
