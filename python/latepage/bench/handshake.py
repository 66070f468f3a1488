"""From connect(2) to the end of a VM's first fault, the only VM of a pager and among a thousand."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from latepage.bench.bench import Bench
from latepage.bench.figures import Figure, Metric
from latepage.bench.machine import LackingError, descriptors, need_userfaultfd
from latepage.bench.processes import Pager, server
from latepage.bench.rounds import Way
from latepage.bench.talker import Talker

__all__ = ["measure"]

P50, P99 = Metric("p50", "ms"), Metric("p99", "ms")
ROUNDS = 9
BARE = "C, one VM"
SIZE = 2 << 20
MANY = 1000

DEMANDED = {1: 1.0, MANY: 2.0}
"""Milliseconds, by how many VMs live in the pager."""


def measure(bench: Bench) -> list[Figure]:
    """Runs it."""
    need_userfaultfd()
    many = bench.sized(MANY, 10)
    memory = bench.memory_file(SIZE)
    names = {1: "1 VM", many: f"among {many:,} live VMs"}
    with ExitStack() as stack:
        limit = bench.folder / "limit.sock"
        stack.enter_context(server(bench.programs["server"], limit, memory, str(SIZE), "keep", socket=limit))
        ways = [
            Way(
                BARE,
                partial(_greet, bench, stack.enter_context(Talker(bench.programs["crowd"], limit, "0", str(SIZE)))),
                peer=True,
            )
        ]
        for live, name in names.items():
            try:
                descriptors(10 * live + 500)
            except LackingError as why:
                bench.leave_out(f"handshake, {name}", why)
                continue
            bench.tell(0.0, f"start {live:,} VMs")
            pager = stack.enter_context(Pager(bench.socket(), memory))
            # The one that is greeted is the only one, or one more.
            if live > 1:
                stack.enter_context(Talker(bench.programs["crowd"], pager.socket, str(live), str(SIZE)))
                for _ in range(live):
                    pager.event("session-started")
            newcomers = stack.enter_context(Talker(bench.programs["crowd"], pager.socket, "0", str(SIZE)))
            ways.append(Way(name, partial(_greet, bench, newcomers)))
        rounds = bench.in_turns("handshake", ways, ROUNDS)
    figures: list[Figure] = []
    for (live, name), demanded in zip(names.items(), DEMANDED.values(), strict=True):
        if name in rounds:
            figures.append(rounds.against(name, P50, f"demanded with {live:,}", demanded, rounds.error(BARE, P50)))
            figures += [*rounds.figures(name, P50, {BARE: None}), *rounds.figures(name, P99, {BARE: None})]
    return figures


def _greet(bench: Bench, newcomers: Talker) -> Mapping[str, float]:
    said = newcomers.ask(f"greet {bench.sized(100, 5)}")
    return {"p50": said["p50"] / 1e6, "p99": said["p99"] / 1e6}
