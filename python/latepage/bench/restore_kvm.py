"""The restore of a real VM: the reference VMM's guest on /dev/kvm touches all of its memory in sequence, the memory file hot.

Where KVM emulates its guests, most of the time is the guest's own, which is the same in all ways: ratios are nearer to 1 than
with threads as the guest.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from latepage.bench.bench import Bench
from latepage.bench.best_filler import Filler
from latepage.bench.figures import Figure, Metric
from latepage.bench.machine import LackingError
from latepage.bench.memory_file import warm
from latepage.bench.processes import Pager, server
from latepage.bench.rounds import Way
from latepage.errors import LatepageError
from latepage.kvm import Job, VmProcess

__all__ = ["measure_kvm"]

TIME = Metric("time", "ms")
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A VM that was saved.

    Attributes:
        state: its state file.
        memory: its memory file.
    """

    state: Path
    memory: Path

    def restored(self, core: int | None = None, **origin: Any) -> Mapping[str, float]:
        """Restores it until its guest has touched everything; then every byte is compared with what it should be."""
        warm(self.memory)
        with VmProcess.restore(self.state, Job("touch"), guest="kvm", compare=True, **origin) as vm:
            if core is not None:
                os.sched_setaffinity(vm.pid, (core,))
            report = vm.done()
            if vm.event("compared")["wrong_pages"]:
                raise LatepageError("pages of the restored VM are wrong")
        assert report.ended_ns is not None  # noqa: S101 (it is done)
        return {TIME.name: report.ended_ns / 1e6}


def measure_kvm(
    bench: Bench,
    best: Filler,
    peers: Mapping[str, float | None],
    flags: tuple[str, ...],
    part: tuple[float, float],
) -> list[Figure]:
    """The figures.

    Args:
        bench: what a question is given.
        best: the best C by userfaultfd.
        peers: the bounds of the best C, of the handler of a page a fault, and of the lazy mmap, by their names in this order.
        flags: of `latepage serve`.
        part: of the question's progress.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise LackingError("no access to /dev/kvm: `latepage check` says how to get it")
    bench.tell(part[0], "KVM: fill a VM and save it")
    snapshot = _saved(bench)
    names = dict(zip(("best", "one page", "lazy"), peers, strict=True))
    with ExitStack() as stack:
        pager = stack.enter_context(Pager(bench.socket(), snapshot.memory, *flags))
        ways = [
            Way(names["best"], partial(_by_filler, bench, snapshot, best), peer=True),
            Way(names["one page"], partial(_served, bench, snapshot, None, "server"), peer=True),
            Way(names["lazy"], partial(snapshot.restored, map_file=snapshot.memory), peer=True),
            Way("KVM, in sequence, hot", partial(_ours, snapshot, pager)),
        ]
        rounds = bench.in_turns("restore", ways, ROUNDS, part)
    return rounds.figures("KVM, in sequence, hot", TIME, peers)


def _saved(bench: Bench) -> Snapshot:
    snapshot = Snapshot(bench.folder / "kvm.state", bench.folder / "kvm.mem")
    memory = bench.sized(256 << 20, 8 << 20)
    saved = (snapshot.state, snapshot.memory)
    with VmProcess.create(Job("fill", seed=1), memory=memory, guest="kvm", save=saved) as vm:
        vm.event("saved")
    return snapshot


def _ours(snapshot: Snapshot, pager: Pager) -> Mapping[str, float]:
    took = snapshot.restored(pager=pager.socket, handshake="firecracker")
    pager.event("ended")
    return took


def _by_filler(bench: Bench, snapshot: Snapshot, filler: Filler) -> Mapping[str, float]:
    return _served(bench, snapshot, filler.core, "filler", *filler.options)


def _served(bench: Bench, snapshot: Snapshot, core: int | None, program: str, *options: str) -> Mapping[str, float]:
    socket = bench.folder / "limit.sock"
    size = str(snapshot.memory.stat().st_size)
    with server(bench.programs[program], socket, snapshot.memory, size, *options, socket=socket):
        return snapshot.restored(core, pager=socket, handshake="firecracker")
