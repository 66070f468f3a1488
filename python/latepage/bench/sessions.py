"""What many VMs in one pager cost: CPU a fault as their number grows, memory for each, and CPU while all are idle.

A steady trickle of faults, the same in all, goes over the VMs in turns. Each page is a fault of its own: ours are told to bring
nothing beside it.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from latepage.bench.bench import Bench
from latepage.bench.figures import Figure, Metric, hold_against
from latepage.bench.machine import LackingError, descriptors, need_userfaultfd
from latepage.bench.processes import Pager, cpu_seconds, server
from latepage.bench.rounds import Way
from latepage.bench.talker import Talker

__all__ = ["measure"]

CPU, IDLE, MEMORY = Metric("CPU a fault", "µs"), Metric("CPU while idle", "% of a core"), Metric("memory a VM", "KiB")
ROUNDS = 7
SIZE = 2 << 20
RATE = 1000
"""Faults a second, over all VMs."""

WARMING, PIECE = 20, 400
"""Faults that come before those that count, and how many of one VM's count at once."""

BARE = "C, one VM"
MANY = 1000
BOUND = 1.2
"""CPU a fault with the most VMs, to that with one."""


@dataclass(slots=True)
class Crowd:
    """So many VMs, and who serves them.

    Attributes:
        number: how many VMs.
        server: whose CPU counts.
        started: waits until all of them are served.
        vms: the program that is all of them.
        memory: bytes by which the pager grew for each.
        left: pages that no VM has touched yet.
    """

    number: int
    server: int
    started: Callable[[], None]
    vms: Talker
    memory: float = 0.0
    left: int = 0

    def trickle(self, touches: int) -> Mapping[str, float]:
        """CPU a fault, from a trickle."""
        used, done = 0.0, 0
        while done < touches:
            count = min(touches - done, PIECE * self.number)
            if self.left < WARMING + count:
                # All of their pages are there: new VMs, and the first fault of each is over before it counts.
                self.vms.ask("renew")
                self.started()
                self.vms.ask(f"trickle {RATE} {self.number}")
                self.left = self.number * (SIZE // 4096 - 1)
            self.vms.ask(f"trickle {RATE} {WARMING}")
            before = cpu_seconds(self.server)
            self.vms.ask(f"trickle {RATE} {count}")
            used += cpu_seconds(self.server) - before
            done += count
            self.left -= WARMING + count
        return {CPU.name: 1e6 * used / touches}

    def idle(self, seconds: float) -> Mapping[str, float]:
        """CPU while nothing happens."""
        before, began = cpu_seconds(self.server), time.monotonic()
        time.sleep(seconds)
        return {IDLE.name: 100 * (cpu_seconds(self.server) - before) / (time.monotonic() - began)}


def measure(bench: Bench) -> list[Figure]:
    """Runs it."""
    need_userfaultfd()
    touches = bench.sized(1200, 20)
    with ExitStack() as stack:
        crowds = _crowds(bench, stack)
        ways = [Way(BARE, partial(_bare(bench, stack).trickle, touches), peer=True)]
        ways += [Way(_name(crowd.number), partial(crowd.trickle, touches), peer=crowd.number == 1) for crowd in crowds]
        most = crowds[-1]
        ways.append(Way(f"{_name(most.number)}, idle", partial(most.idle, bench.sized(1.0, 0.1))))
        rounds = bench.in_turns("sessions", ways, ROUNDS)
    figures: list[Figure] = []
    for crowd in crowds:
        bounds = {_name(1): BOUND if crowd is most else None} if crowd.number > 1 else {}
        figures += rounds.figures(_name(crowd.number), CPU, {**bounds, BARE: None})
    if most.number > 1:
        figures.append(rounds.against(f"{_name(most.number)}, idle", IDLE, "demanded", 1.0))
        table = SIZE // 4096
        figures.append(
            hold_against("sessions", _name(most.number), MEMORY, [most.memory / 1024], "state table + 64 KiB", table / 1024 + 64)
        )
    return figures


def _name(number: int) -> str:
    return f"{number:,} VM" + ("s" if number > 1 else "")


def _started(pager: Pager, number: int) -> None:
    for _ in range(number):
        pager.event("session-started")


def _bare(bench: Bench, stack: ExitStack) -> Crowd:
    """One VM, and the least that can serve it."""
    memory, socket = bench.memory_file(SIZE), bench.folder / "limit.sock"
    process = stack.enter_context(server(bench.programs["server"], socket, memory, str(SIZE), "keep", socket=socket))
    vms = stack.enter_context(Talker(bench.programs["crowd"], socket, "1", str(SIZE)))
    return Crowd(1, process.pid, lambda: None, vms)


def _crowds(bench: Bench, stack: ExitStack) -> list[Crowd]:
    memory = bench.memory_file(SIZE)
    found = []
    for number in bench.sized((1, 10, 100, MANY), (1, 10)):
        bench.tell(0.0, f"start {_name(number)}")
        try:
            descriptors(10 * number + 500)
        except LackingError as why:
            bench.leave_out(f"sessions, {_name(number)}", why)
            continue
        pager = stack.enter_context(Pager(bench.socket(), memory, "--fault-around", "4KiB"))
        before = pager.resident()
        vms = stack.enter_context(Talker(bench.programs["crowd"], pager.socket, str(number), str(SIZE)))
        started = partial(_started, pager, number)
        started()
        # A fault for each, so that whatever a VM's first fault takes is there.
        vms.ask(f"trickle 5000 {number}")
        found.append(Crowd(number, pager.pid, started, vms, (pager.resident() - before) / number))
    return found
