"""What a user may choose for the VMs of one socket: one frozen value."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, get_args

from latepage.errors import PolicyError
from latepage.memory import PAGE, format_size
from latepage.session import Session
from latepage.stats import TraceEntry

__all__ = ["FaultAround", "OnMissing", "Order", "Placement", "Policy", "Populate"]

Populate = Literal["none", "background"]
"""`none` supplies what is touched; `background` all the rest as well, while no fault waits."""

Order: TypeAlias = Callable[[Session, Sequence[TraceEntry]], Iterable[tuple[int, int]] | None]
"""Says what is supplied next: it is given a VM and the pages that its guest has touched since the last call, none of them when
the VM starts, and returns pairs of offset and size in the snapshot, in bytes, in the order in which they are wanted; or None."""

TOUCHES = 65_536
"""Entries of the trace of a VM whose population a function directs, unless the policy says otherwise: 1 MiB a VM."""

OnMissing = Literal["kill", "poison"]
"""What happens to a VM whose page cannot be had: it is killed, or that page is poisoned."""


FaultAround: TypeAlias = int | Literal["auto"]
"""Bytes of the aligned window whose absent pages come with a touched one; `auto` goes by what was touched before: the page alone
where touches are scattered, up to 2 MiB where they follow one another."""


Placement: TypeAlias = str
"""Where the worker that serves a VM runs, and how it waits: `auto`, `block`, `spin`, `same-core`, or `core:N`."""

PLACEMENT = re.compile(r"auto|block|spin|same-core|core:(?:0|[1-9][0-9]{0,3})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """One field per flag of `latepage serve`.

    >>> policy = Policy(populate="background", allow_uids={1000})
    >>> policy.on_missing, policy.fault_around, sorted(policy.allow_uids)
    ('kill', 'auto', [1000])
    >>> Policy(stall_warning=0)
    Traceback (most recent call last):
    ...
    latepage.errors.PolicyError: stall_warning is 0: give seconds above zero

    Attributes:
        populate: whether memory is supplied ahead of its faults; or a function that says what comes next, and when (an `Order`;
            docs/policy.md tells the rest). It takes a trace: 65,536 entries unless `trace` says otherwise.
        on_missing: what happens when a page cannot be had.
        fault_around: how much is supplied with a touched page. `auto`: that page alone where touches are scattered, up to 2 MiB
            where they follow one another. A number: the aligned window of so many bytes, a multiple of 4 KiB, which supplies
            that page only.
        placement: where the worker that serves the VM runs, and how it waits. `auto` joins the core of the thread that
            faults where one thread does, else spins for a moment after a fault where that pays and a core is to spare, else
            sleeps. `block` sleeps, `spin` spins, `same-core` sleeps on the core of the thread that faults most, `core:N` sleeps
            on core N.
        mode: permissions of the socket's file.
        owner: user and group, as numbers, whom the socket's file is given to; None keeps it. It takes root.
        allow_uids: users whose VMs are served; empty for everyone whom `mode` lets in.
        stall_warning: seconds after which a fault that still waits is reported.
        handshake_timeout: seconds that a peer has to say who it is.
        detach_when_full: unregister a VM's memory as soon as it has all of it, and let go of the VM.
        trace: how many entries each VM's trace keeps, 16 bytes each; 0 for no trace.
    """

    populate: Populate | Order = "none"
    on_missing: OnMissing = "kill"
    fault_around: FaultAround = "auto"
    placement: Placement = "auto"
    mode: int = 0o660
    owner: tuple[int, int] | None = None
    allow_uids: Collection[int] = frozenset()
    stall_warning: float = 5.0
    handshake_timeout: float = 5.0
    detach_when_full: bool = False
    trace: int = 0

    def __post_init__(self) -> None:
        # Any iterable of ids is welcome; what is kept must be hashable, as the policy is.
        object.__setattr__(self, "allow_uids", frozenset(self.allow_uids))
        if callable(self.populate) and self.trace == 0:
            object.__setattr__(self, "trace", TOUCHES)
        for name, choices in (("populate", Populate), ("on_missing", OnMissing)):
            value = getattr(self, name)
            if value not in get_args(choices) and not (name == "populate" and callable(value)):
                raise PolicyError(f"{name} is {value!r}: choose one of {', '.join(get_args(choices))}")
        for name in ("stall_warning", "handshake_timeout"):
            if not 0 < getattr(self, name) <= 86_400:
                raise PolicyError(f"{name} is {getattr(self, name)}: give seconds above zero")
        around = self.fault_around
        if around != "auto" and (not PAGE <= around <= 1 << 30 or around % PAGE):
            raise PolicyError(
                f"fault_around is {around}: give auto, or a multiple of {format_size(PAGE)}, "
                f"from {format_size(PAGE)} (only the page) to 1 GiB"
            )
        if not PLACEMENT.fullmatch(str(self.placement)):
            raise PolicyError(
                f"placement is {self.placement!r}: choose auto, block, spin, same-core, or core:N with the number of a core"
            )
        if not 0 <= self.trace <= 1 << 30:
            raise PolicyError(f"trace is {self.trace}: give a number of entries, from 0 (none) to 2^30")
        if not 0 <= self.mode <= 0o777:
            raise PolicyError(f"mode is {self.mode:#o}: give the permissions of a file, as in 0660")
        if self.owner is not None and (
            tuple(map(type, self.owner)) != (int, int) or any(not 0 <= number < (1 << 32) - 1 for number in self.owner)
        ):
            raise PolicyError(f"owner is {self.owner}: give a user's and a group's number, as in (1000, 1000)")
        if any(uid < 0 or uid >= 1 << 32 for uid in self.allow_uids):
            raise PolicyError("allow_uids has a number that is no user's id")

    def as_dict(self) -> dict[str, object]:
        """The fields by name, as the engine takes them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if callable(self.populate):
            # Of itself the engine brings nothing unasked: what comes next is said by a thread of Python's.
            values["populate"] = "none"
        if self.fault_around == "auto":
            values["fault_around"] = None
        return values | {"allow_uids": sorted(self.allow_uids)}
