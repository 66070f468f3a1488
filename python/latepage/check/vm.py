"""A running VM, as its userfaultfds, its registered memory and its waiting threads show it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latepage.check import proc
from latepage.check.holders import Holder, Search, search
from latepage.check.userfaultfd import FEATURES
from latepage.check.verdict import Facts, Verdict, judge, unseen_processes
from latepage.errors import CheckError

__all__ = ["LOOK", "VmReport", "check_vm"]

LOOK = 1.0
"""Seconds that a fault is given to be served before it is said to hang. A look ends sooner, as soon as none is left."""
PAUSE = 0.02
"""Seconds between two looks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VmReport:
    """What was seen of a VM.

    Attributes:
        process: the VMM.
        verdict: one word.
        says: the same in a sentence.
        todo: what to do, or None.
        userfaultfds: the VMM's.
        holders: who else holds them.
        regions: its registered memory.
        waiting: threads that wait, or None where that cannot be seen.
        stuck: those among them that have not run during the whole look.
        looked: for how long it was looked at what waited, in seconds.
        unseen: what could not be looked at, in words.
        kvm: whether it has a VM of KVM.
    """

    process: proc.Status
    verdict: Verdict
    says: str
    todo: str | None
    userfaultfds: tuple[proc.Descriptor, ...]
    holders: tuple[Holder, ...]
    regions: tuple[proc.Region, ...]
    waiting: tuple[proc.Thread, ...] | None
    stuck: tuple[proc.Thread, ...]
    looked: float
    unseen: tuple[str, ...]
    kvm: bool

    @property
    def is_well(self) -> bool:
        """Whether nothing is known to be wrong with it."""
        return self.verdict in ("served", "full", "unseen")

    def as_dict(self) -> dict[str, Any]:
        """As `latepage check PID --json` prints it; docs/check.md lists the keys."""
        return {
            "format": 1,
            "pid": self.process.pid,
            "command": self.process.command,
            "uid": self.process.uid,
            "kvm": self.kvm,
            "verdict": self.verdict,
            "says": self.says,
            "todo": self.todo,
            "userfaultfds": [
                {
                    "fd": descriptor.number,
                    "pending": descriptor.pending,
                    "waiting": descriptor.waiting,
                    "features": feature_names(descriptor.features),
                    "holders": [_holder(holder) for holder in self.holders if holder.of == descriptor.number],
                }
                for descriptor in self.userfaultfds
            ],
            "regions": [
                {
                    "start": region.start,
                    "size": region.size,
                    "present": region.present,
                    "page_size": region.page_size,
                    "modes": list(region.modes),
                    "path": region.path or None,
                }
                for region in self.regions
            ],
            "waiting": None
            if self.waiting is None
            else [
                {
                    "tid": thread.tid,
                    "name": thread.name,
                    "waits_for": thread.waits_for,
                    "stuck": any(thread.tid == other.tid for other in self.stuck),
                }
                for thread in self.waiting
            ],
            "looked": round(self.looked, 3),
            "unseen": list(self.unseen),
        }


def _holder(holder: Holder) -> dict[str, Any]:
    process = holder.process
    return {
        "pid": process.pid,
        "fd": holder.number,
        "command": process.command,
        "uid": process.uid,
        "state": process.state,
    }


def feature_names(bits: int) -> list[str]:
    """The names of the features that a userfaultfd was made with.

    >>> feature_names(0x8000_0008)
    ['event_remove']
    """
    return [name for bit, name in enumerate(FEATURES) if bits >> bit & 1]


@dataclass(frozen=True)
class _Seen:
    """One look at the VMM."""

    descriptors: tuple[proc.Descriptor, ...]
    threads: tuple[proc.Thread, ...] | None

    @property
    def faults(self) -> int:
        return sum(descriptor.waiting for descriptor in self.descriptors)


def check_vm(pid: int) -> VmReport:
    """Looks at the VM of process `pid`; changes nothing there.

    Where faults wait, it looks again until they are gone, for `LOOK` seconds at most.

    Raises:
        CheckError: if there is no such process, it is no VMM, or may not be looked into.
    """
    process = _process(pid)
    try:
        return _look(process)
    except PermissionError:
        raise CheckError(f"{process} may not be looked into from here: {_forbidden(process.uid)}", call="open") from None
    except (FileNotFoundError, ProcessLookupError):
        raise CheckError(f"{process} ended while it was looked at") from None


def _forbidden(uid: int) -> str:
    """Why a process of that user is closed to this one, and what to do."""
    if os.geteuid() == 0:
        return (
            "it has more rights than root has here (a container's root has few); give this CAP_SYS_PTRACE, or look from the host"
        )
    if uid == os.geteuid():
        return "it is of this user, but has more rights, or Yama's ptrace_scope forbids it; run this as root"
    return f"it belongs to user {uid}; run this as root"


def _process(pid: int) -> proc.Status:
    try:
        process = proc.status(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise CheckError(f"there is no process {pid} here; a VMM in a container has another number outside it") from None
    if process.state == "Z":
        raise CheckError(f"{process} has ended, and its parent has not asked how")
    if process.is_kernel:
        raise CheckError(f"{process} is a thread of the kernel, not a VMM")
    return process


def _look(process: proc.Status) -> VmReport:
    pid = process.pid
    first = _Seen(proc.descriptors(pid), proc.threads(pid))
    regions, has_kvm = proc.regions(pid), proc.is_vmm(pid)
    # Only of what has no registered memory is it asked whether it is a pager.
    found = search(pid, first.descriptors, with_regions=not regions)
    _must_be_vmm(process, first, regions, found, has_kvm)
    lasting = _look_again(first, lambda: _Seen(proc.descriptors(pid), proc.threads(pid)))
    last = lasting.last
    enclosed = proc.is_enclosed()
    unseen = []
    if found.unseen and not found.holders:
        unseen.append(f"the descriptors of {unseen_processes(found.unseen)}")
    if enclosed and not found.holders:
        unseen.append("processes outside of this container")
    if last.threads is None:
        unseen.append("in what its threads wait: that takes the right to ptrace it")
    if found.compared_by == "inode" and found.holders:
        unseen.append("kcmp(2) is not to be had: holders were found by the inode of their descriptors")
    itself = any(proc.polls(pid, descriptor.number) for descriptor in last.descriptors)
    seen = Facts(process, last.descriptors, regions, found, itself, lasting.stuck, lasting.faults, lasting.looked, enclosed)
    verdict, says, todo = judge(seen)
    return VmReport(
        process=process,
        verdict=verdict,
        says=says,
        todo=todo,
        userfaultfds=last.descriptors,
        holders=found.holders,
        regions=regions,
        waiting=last.threads,
        stuck=lasting.stuck,
        looked=lasting.looked,
        unseen=tuple(unseen),
        kvm=has_kvm,
    )


def _must_be_vmm(process: proc.Status, seen: _Seen, regions: tuple[proc.Region, ...], found: Search, has_kvm: bool) -> None:
    served = sorted({holder.process.pid for holder in found.holders if holder.has_regions})
    if seen.descriptors and not regions and served:
        shown = ", ".join(map(str, served[:8])) + (" …" if len(served) > 8 else "")
        raise CheckError(f"{process} is no VMM but a pager: it serves {shown}; look at those")
    if not (seen.descriptors or regions or has_kvm):
        raise CheckError(f"{process} is no VMM: it has no userfaultfd, and no VM of KVM")


@dataclass(frozen=True)
class _Lasting:
    """What waited at every look.

    Attributes:
        last: the last look.
        stuck: threads that have not run.
        faults: how many, where no thread shows: KVM may have a kernel thread wait for it.
        looked: for how long, in seconds.
    """

    last: _Seen
    stuck: tuple[proc.Thread, ...]
    faults: int
    looked: float


def _look_again(first: _Seen, look: Callable[[], _Seen]) -> _Lasting:
    """Looks until nothing of what waited at first waits any more."""
    last, stuck = first, first.threads or ()
    faults = 0 if stuck else first.faults
    began = time.monotonic()
    while (stuck or faults) and time.monotonic() < began + LOOK:
        time.sleep(PAUSE)
        last = look()
        if faults and last.threads:
            # The fault was counted just before its thread had fallen asleep.
            stuck, faults, began = last.threads, 0, time.monotonic()
        stuck = tuple(thread for thread in stuck if thread in (last.threads or ()))
        faults = min(faults, last.faults)
    return _Lasting(last, stuck, faults, time.monotonic() - began)
