"""What a pager tells: one frozen value for each thing that happened, in the order in which it happened.

The same events stand in the log, one JSON object a line, with the same names and fields.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

__all__ = [
    "Detached",
    "Drained",
    "Draining",
    "Ended",
    "Event",
    "Failed",
    "LeaseBreaking",
    "Left",
    "Listening",
    "Lost",
    "NoMemory",
    "Populated",
    "PopulationStopped",
    "Refused",
    "SessionStarted",
    "SourceChanged",
    "Stall",
    "Surprise",
    "WaitingFor",
    "Warned",
    "from_engine",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """The base of every event.

    Attributes:
        at: when it happened, in seconds since 1970.
    """

    event: ClassVar[str] = ""
    """What it is called in the log."""

    at: float

    def as_dict(self) -> dict[str, Any]:
        """Its name and its fields, as the log has them.

        >>> Detached(at=1.5, vm="vm-7").as_dict()
        {'event': 'detached', 'at': 1.5, 'vm': 'vm-7'}
        """
        return {"event": self.event, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Listening(Event):
    """VMs may connect to `socket`; they get their memory from `source`, of `size` bytes."""

    event: ClassVar[str] = "listening"
    socket: str
    source: str
    size: int


@dataclass(frozen=True, kw_only=True)
class SessionStarted(Event):
    """A VM has shaken hands and is served from now on.

    Attributes:
        vm: its name, unique among the pager's sessions.
        pid: the VMM's process.
        form: the handshake it used, `firecracker` or `latepage`.
        backing: what its memory is made of: `anonymous`, `private`, `shared` or `hugetlb`.
        size: bytes of its memory.
        vcpus: how many vCPUs it says it has.
        source: what its memory comes from.
    """

    event: ClassVar[str] = "session-started"
    vm: str
    pid: int
    form: str
    backing: str
    size: int
    vcpus: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Refused(Event):
    """A peer is not served.

    Attributes:
        socket: where it connected.
        vm: its name, as far as it said one.
        pid: its process.
        uid: its user.
        reason: which rule it broke.
        action: what was done to it, since it would hang otherwise; `none` where it had sent no userfaultfd.
    """

    event: ClassVar[str] = "refused"
    socket: str
    vm: str | None
    pid: int
    uid: int
    reason: str
    action: str


@dataclass(frozen=True, kw_only=True)
class Populated(Event):
    """A VM has all of its memory.

    Attributes:
        vm: its name.
        seconds: since its session began.
        faults: how many it took until then.
        failed: pages that could not be had.
    """

    event: ClassVar[str] = "populated"
    vm: str
    seconds: float
    faults: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class Detached(Event):
    """A full VM's memory is unregistered; it needs no pager any more."""

    event: ClassVar[str] = "detached"
    vm: str


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """A session is over, and nothing of it is left in the pager.

    Attributes:
        vm: its name.
        reason: why: the VM has gone, was let go, or the pager was closed.
        seconds: how long it lasted.
        faults: how many were delivered.
        lacking: pages that the VM did not get.
    """

    event: ClassVar[str] = "ended"
    vm: str
    reason: str
    seconds: float
    faults: int
    lacking: int


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """A page could not be had, and failed closed.

    Attributes:
        vm: whose page.
        address: where in the VMM's process.
        page: its index in the session, where the address is in a region.
        reason: why.
        action: what was done about it.
    """

    event: ClassVar[str] = "failed"
    vm: str
    address: int
    page: int | None
    reason: str
    action: str


@dataclass(frozen=True, kw_only=True)
class Stall(Event):
    """A fault has waited for longer than the policy's `stall_warning`.

    Attributes:
        vm: whose fault.
        address: where in the VMM's process.
        age: seconds that it has waited so far.
    """

    event: ClassVar[str] = "stall"
    vm: str
    address: int
    age: float


@dataclass(frozen=True, kw_only=True)
class PopulationStopped(Event):
    """Population met an error and stopped there; faults go on being served."""

    event: ClassVar[str] = "population-stopped"
    vm: str
    address: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Surprise(Event):
    """A VM did something that a pager cannot follow."""

    event: ClassVar[str] = "surprise"
    vm: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """The pager cannot do something that it may need."""

    event: ClassVar[str] = "warning"
    what: str


@dataclass(frozen=True, kw_only=True)
class SourceChanged(Event):
    """A memory file was written to, or changed its size, while it is served."""

    event: ClassVar[str] = "source-changed"
    source: str
    change: str


@dataclass(frozen=True, kw_only=True)
class LeaseBreaking(Event):
    """Someone opens a memory file for writing; the read lease holds him back for `seconds` at most."""

    event: ClassVar[str] = "lease-breaking"
    source: str
    seconds: float
    change: str


@dataclass(frozen=True, kw_only=True)
class NoMemory(Event):
    """The machine has no page for a VM (an empty hugetlb pool?); the fault waits and is tried again."""

    event: ClassVar[str] = "no-memory"
    vm: str
    address: int


@dataclass(frozen=True, kw_only=True)
class Draining(Event):
    """No new VM is taken; the `vms` that live get all that they lack."""

    event: ClassVar[str] = "draining"
    vms: int


@dataclass(frozen=True, kw_only=True)
class WaitingFor(Event):
    """The drain waits for this VM to end, for the reason given."""

    event: ClassVar[str] = "waiting-for"
    vm: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Drained(Event):
    """Every VM has ended or needs no pager any more."""

    event: ClassVar[str] = "drained"


@dataclass(frozen=True, kw_only=True)
class Left(Event):
    """The pager ends and this VM lives: its next fault or discard waits for ever, until someone ends it.

    Attributes:
        lacking: pages that had not come.
    """

    event: ClassVar[str] = "left"
    vm: str
    lacking: int


@dataclass(frozen=True, kw_only=True)
class Lost(Event):
    """Nobody read the events for so long that the oldest were dropped."""

    event: ClassVar[str] = "lost"
    count: int


_KINDS: dict[str, type[Event]] = {kind.event: kind for kind in Event.__subclasses__()}


def from_engine(raw: Mapping[str, Any]) -> Event:
    """The event that the engine's plain description stands for.

    >>> from_engine({"event": "stall", "at": 2.0, "vm": "vm-7", "address": 0x7F00, "age": 5.1})
    Stall(at=2.0, vm='vm-7', address=32512, age=5.1)
    """
    kind = _KINDS[raw["event"]]
    return kind(**{field.name: raw[field.name] for field in fields(kind)})
