"""Real vCPUs whose faults go through a userfaultfd: the reference VMM's guest on /dev/kvm touches its memory at random.

Where KVM emulates its guests, most of that time is the guest's own.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from latepage.bench.bench import Bench
from latepage.bench.figures import Figure, Metric
from latepage.bench.machine import LackingError
from latepage.bench.processes import Pager, server
from latepage.bench.rounds import Way
from latepage.errors import LatepageError
from latepage.kvm import Job, VmProcess

__all__ = ["measure_kvm"]

RATE = Metric("rate", "k pages/s", "more")
COUNTS = (1, 8, 64)
ROUNDS = 2
PEER = "C, one userfaultfd"
SHARD = 16
"""vCPUs for each userfaultfd, where there are several."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A VM of so many vCPUs that was saved.

    Attributes:
        vcpus: how many.
        state: its state file.
        memory: its memory file.
    """

    vcpus: int
    state: Path
    memory: Path

    def touched(self, socket: Path, shards: int | None = None) -> Mapping[str, float]:
        """Restores it, has its guest touch every page once, and checks how many were."""
        job = Job("touch", order="random", seed=1)
        with VmProcess.restore(self.state, job, guest="kvm", backing="shared", pager=socket, shards=shards) as vm:
            report = vm.done()
        if report.ended_ns is None or report.done != report.pages:
            raise LatepageError(f"the VM of {self.vcpus} vCPUs has touched {report.done} of {report.pages} pages")
        return {RATE.name: 1e6 * report.pages / (report.ended_ns - report.started_ns)}


def measure_kvm(bench: Bench, part: tuple[float, float]) -> list[Figure]:
    """Pages a second, by the number of vCPUs.

    Raises:
        LackingError: there is no KVM here.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise LackingError("no access to /dev/kvm: `latepage check` says how to get it")
    found: list[Figure] = []
    counts = bench.sized(COUNTS, (1, 2 * SHARD))
    for number, count in enumerate(counts):
        share = (part[1] - part[0]) / len(counts)
        within = (part[0] + number * share, part[0] + (number + 1) * share)
        bench.tell(within[0], f"KVM: fill a VM of {count} vCPUs and save it")
        snapshot = _saved(bench, count)
        named = f"{count} vCPU" + ("s" if count > 1 else "")
        way, several = f"KVM, uffd, {named}", f"KVM, uffd in shards, {named}"
        with ExitStack() as stack:
            pager = stack.enter_context(Pager(bench.socket(), snapshot.memory, "--fault-around", "4KiB"))
            ways = [Way(PEER, partial(_by_c, bench, snapshot), peer=True), Way(way, partial(_ours, snapshot, pager))]
            if count > SHARD:
                ways.append(Way(several, partial(_ours, snapshot, pager, count // SHARD)))
            rounds = bench.in_turns("scale", ways, ROUNDS, within)
            found += rounds.figures(way, RATE, {PEER: None})
            found += rounds.figures(several, RATE, {PEER: None})
    return found


def _saved(bench: Bench, vcpus: int) -> Snapshot:
    snapshot = Snapshot(vcpus, bench.folder / f"{vcpus}.state", bench.folder / f"{vcpus}.mem")
    saved = (snapshot.state, snapshot.memory)
    size = bench.sized(64 << 20, 8 << 20)
    with VmProcess.create(Job("fill", seed=1), memory=size, vcpus=vcpus, guest="kvm", save=saved) as vm:
        vm.event("saved")
    return snapshot


def _ours(snapshot: Snapshot, pager: Pager, shards: int | None = None) -> Mapping[str, float]:
    rate = snapshot.touched(pager.socket, shards)
    pager.event("ended")
    return rate


def _by_c(bench: Bench, snapshot: Snapshot) -> Mapping[str, float]:
    socket = bench.folder / "limit.sock"
    size = str(snapshot.memory.stat().st_size)
    with server(bench.programs["server"], socket, snapshot.memory, size, "batch", socket=socket):
        return snapshot.touched(socket)
