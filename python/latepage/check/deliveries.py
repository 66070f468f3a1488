"""What each delivery of docs/design.md would need of this host, and whether latepage has it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latepage.check.items import Item, State

__all__ = ["Delivery", "deliveries"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One way for faults to reach whoever resolves them.

    Attributes:
        name: as docs/design.md calls it.
        in_latepage: whether latepage has it today.
        kernel: whether this host has all that it needs.
        needs: keys of the items that it needs; of those in one tuple, any one.
        lacks: those among them that are not there, or could not be tried.
        says: what it is, in a sentence.
    """

    name: str
    in_latepage: bool
    kernel: State
    needs: tuple[tuple[str, ...], ...]
    lacks: tuple[str, ...]
    says: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "in_latepage": self.in_latepage,
            "kernel": self.kernel,
            "needs": [list(some) for some in self.needs],
            "lacks": list(self.lacks),
            "says": self.says,
        }


EXITS = ("kvm.exit_by_attributes", "kvm.exit_by_userfault")
DELIVERIES: dict[str, tuple[bool, tuple[tuple[str, ...], ...], str]] = {
    "uffd": (
        True,
        (("userfaultfd.kernel",), ("userfaultfd.feature.event_remove",), ("kvm.userfaultfd",)),
        "the VMM hands its userfaultfd to the pager",
    ),
    "exit": (
        True,
        (
            EXITS,
            ("kvm.memory_fault_info",),
            ("memory.memfd",),
            ("userfaultfd.kernel",),
            ("userfaultfd.feature.minor_shmem",),
        ),
        "a vCPU's access leaves the guest and is resolved on its own thread; KVM's own accesses still come by userfaultfd",
    ),
    "notify": (
        True,
        (
            EXITS,
            ("kvm.memory_fault_info",),
            ("memory.memfd",),
            ("userfaultfd.kernel",),
            ("userfaultfd.feature.minor_shmem",),
        ),
        "the VMM passes its exits on through a channel in shared memory",
    ),
}


def deliveries(items: Mapping[str, Item]) -> tuple[Delivery, ...]:
    """Each delivery, judged by what was found."""
    judged = []
    for name, (in_latepage, needs, says) in DELIVERIES.items():
        states = {some: _best([items[key].state for key in some]) for some in needs}
        lacks = tuple(key for some in needs if states[some] != "yes" for key in some)
        kernel: State = "no" if "no" in states.values() else "unknown" if "unknown" in states.values() else "yes"
        judged.append(Delivery(name=name, in_latepage=in_latepage, kernel=kernel, needs=needs, lacks=lacks, says=says))
    return tuple(judged)


def _best(states: list[State]) -> State:
    return "yes" if "yes" in states else "unknown" if "unknown" in states else "no"
