"""What is shown of a pager and its VMs: one look, and the rates between two."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["Cell", "ClassLatency", "Look", "Pages", "Rates", "Vm", "VmLook", "rates", "total_rates"]


@dataclass(frozen=True, slots=True)
class Pages:
    """How many pages are in which state, as `latepage.Progress` has them."""

    total: int
    present: int
    removed: int
    failed: int
    lacking: int

    @property
    def share(self) -> float:
        """How much has come, from 0 to 1.

        >>> Pages(total=4, present=1, removed=0, failed=0, lacking=3).share
        0.25
        """
        return 1 - self.lacking / self.total


@dataclass(frozen=True, slots=True)
class Vm:
    """One VM at one moment. Times are in seconds.

    Attributes:
        name: its name.
        pid: its VMM's process.
        form: its handshake.
        backing: what its memory is made of.
        vcpus: how many it says it has.
        age: since its session began.
        size: bytes of memory.
        page_size: bytes of a page.
        pages: what has become of them.
        counters: the engine's.
        p50: half of its faults waited no longer.
        p99: 99 of 100 waited no longer.
        longest: the longest wait.
    """

    name: str
    pid: int
    form: str
    backing: str
    vcpus: int
    age: float
    size: int
    page_size: int
    pages: Pages
    counters: Mapping[str, int]
    p50: float
    p99: float
    longest: float

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Self:
        """From one entry of /vms."""
        latency, pages = said["latency"], said["pages"]
        return cls(
            name=said["name"],
            pid=said["pid"],
            form=said["form"],
            backing=said["backing"],
            vcpus=said["vcpus"],
            age=said["age"],
            size=said["size"],
            page_size=said["page_size"],
            pages=Pages(pages["total"], pages["present"], pages["removed"], pages["failed"], pages["lacking"]),
            counters=said["counters"],
            p50=latency["p50"],
            p99=latency["p99"],
            longest=latency["max"],
        )


@dataclass(frozen=True, slots=True)
class Look:
    """A pager and its VMs at one moment.

    Attributes:
        at: when, in seconds since 1970.
        clock: the same on a clock of the pager's machine that never goes back.
        pid: the pager's process.
        latepage: its version.
        ready: whether it takes VMs.
        sockets: pairs of where it listens and what it serves from.
        events: how many of each kind there have been.
        counters: the engine's, of all VMs that there ever were.
        p50: half of all faults waited no longer.
        p99: 99 of 100 waited no longer.
        vms: those that are served now.
    """

    at: float
    clock: float
    pid: int
    latepage: str
    ready: bool
    sockets: tuple[tuple[str, str], ...]
    events: Mapping[str, int]
    counters: Mapping[str, int]
    p50: float
    p99: float
    vms: tuple[Vm, ...]

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Self:
        """From what /vms answers."""
        pager = said["pager"]
        return cls(
            at=said["at"],
            clock=said["clock"],
            pid=pager["pid"],
            latepage=pager["latepage"],
            ready=pager["ready"],
            sockets=tuple((entry["socket"], entry["source"]) for entry in pager["sockets"]),
            events=pager["events"],
            counters=pager["counters"],
            p50=pager["latency"]["p50"],
            p99=pager["latency"]["p99"],
            vms=tuple(Vm.from_json(vm) for vm in said["vms"]),
        )


Cell = tuple[int, int, int, int]
"""Pages that are present, removed, failed, lacking."""


@dataclass(frozen=True, slots=True)
class ClassLatency:
    """The faults that met one kind of page and ended in one way."""

    page_class: str
    result: str
    count: int
    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class VmLook:
    """One VM, looked into.

    Attributes:
        clock: when, on a clock that never goes back.
        vm: the VM.
        regions: as /vms/NAME has them.
        latencies: its faults by page class and result.
        cells: its memory, divided evenly.
    """

    clock: float
    vm: Vm
    regions: tuple[Mapping[str, Any], ...]
    latencies: tuple[ClassLatency, ...]
    cells: tuple[Cell, ...]

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Self:
        """From what /vms/NAME answers."""
        vm = said["vm"]
        return cls(
            clock=said["clock"],
            vm=Vm.from_json(vm),
            regions=tuple(vm["regions"]),
            latencies=tuple(
                ClassLatency(entry["page_class"], entry["result"], entry["count"], entry["p50"], entry["p99"])
                for entry in vm["faults_by"]
            ),
            cells=tuple((present, removed, failed, lacking) for present, removed, failed, lacking in vm["cells"]),
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened in a second, between two looks.

    Attributes:
        faults: that guests took.
        population: pages that came before anyone asked.
        bytes: of guest memory installed.
    """

    faults: float
    population: float
    bytes: float


def rates(before: Look | VmLook | None, now: Look | VmLook, vm: Vm) -> Rates | None:
    """A VM's rates since the last look; None if it was not there then, or was another of that name.

    >>> vm = Vm("vm-7", 1, "latepage", "shared", 1, 9.0, 4096, 4096, Pages(1, 0, 0, 0, 1), dict.fromkeys(COUNTED, 0), 0, 0, 0)
    >>> rates(None, Look(1.0, 1.0, 1, "", True, (), {}, {}, 0, 0, (vm,)), vm) is None
    True
    """
    if isinstance(before, Look):
        earlier = next((other for other in before.vms if other.name == vm.name), None)
    else:
        earlier = None if before is None else before.vm
    if before is None or earlier is None or (earlier.pid, vm.age >= earlier.age) != (vm.pid, True):
        return None
    return _between(earlier.counters, vm.counters, now.clock - before.clock)


def total_rates(before: Look | None, now: Look) -> Rates | None:
    """The pager's rates since the last look; None if there was none, or it was another pager's."""
    if before is None or before.pid != now.pid:
        return None
    return _between(before.counters, now.counters, now.clock - before.clock)


COUNTED = ("faults", "populated_pages", "bytes_installed")


def _between(before: Mapping[str, int], now: Mapping[str, int], seconds: float) -> Rates | None:
    grown = [now[name] - before[name] for name in COUNTED]
    # A clock or a counter that went back is another pager's, with the same process number.
    if seconds <= 0 or min(grown) < 0:
        return None
    return Rates(*(count / seconds for count in grown))
