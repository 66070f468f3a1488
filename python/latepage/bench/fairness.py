"""What a quiet VM's faults wait while a neighbour in the same pager faults as fast as it can."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from latepage.bench.bench import Bench
from latepage.bench.figures import Figure, Metric
from latepage.bench.machine import need_userfaultfd
from latepage.bench.processes import Pager
from latepage.bench.rounds import Way
from latepage.bench.talker import Talker

__all__ = ["measure"]

P50, P99 = Metric("p50", "µs"), Metric("p99", "µs")
ROUNDS = 5
THREADS = 4
"""Of the neighbour."""

BOUND = 3.0

KINDS = {"a page a fault": ("--fault-around", "4KiB"), "as it is": ()}
"""Flags of `latepage serve`: most faults, and most bytes."""

ALONE = "the quiet VM alone"
GRANULE = 16
"""Pages between two touches, so that what is brought beside a fault is not touched."""


class Quiet:
    """A VM that touches a page every millisecond, with or without a neighbour."""

    def __init__(self, bench: Bench, pager: Pager, memory: Path, *, neighbour: bool = False) -> None:
        self.bench, self.pager, self.neighbour = bench, pager, neighbour
        self.size = str(memory.stat().st_size)
        self.touches = 0
        self.seconds = 0.0

    def run(self) -> Mapping[str, float]:
        """Measures once."""
        with ExitStack() as stack:
            beside = None
            if self.neighbour:
                beside = stack.enter_context(self._started("neighbour", self.size, f"threads={THREADS}"))
            quiet = stack.enter_context(self._started("crowd", "1", self.size, f"granule={GRANULE}"))
            said = quiet.ask(f"trickle 1000 {self.bench.sized(1500, 100)}")
            if beside is not None:
                loud = beside.finish()
                self.touches += loud["touches"]
                self.seconds += loud["ns"] / 1e9
        return {"p50": said["p50"] / 1e3, "p99": said["p99"] / 1e3}

    def rate(self) -> float:
        """The neighbour's touches a second, all of them faults with a page a fault."""
        return self.touches / self.seconds

    def _started(self, program: str, *arguments: str) -> Talker:
        return Talker(self.bench.programs[program], self.pager.socket, *arguments)


def measure(bench: Bench) -> list[Figure]:
    """Runs it."""
    need_userfaultfd()
    figures: list[Figure] = []
    memory = bench.memory_file(bench.sized(256 << 20, 16 << 20))
    for number, (name, flags) in enumerate(KINDS.items()):
        with ExitStack() as stack:
            pager = stack.enter_context(Pager(bench.socket(), memory, *flags))
            alone, beside = Quiet(bench, pager, memory), Quiet(bench, pager, memory, neighbour=True)
            ways = [Way(ALONE, alone.run, peer=True), Way(f"beside a neighbour, {name}", beside.run)]
            rounds = bench.in_turns("fairness", ways, ROUNDS, (number / len(KINDS), (number + 1) / len(KINDS)))
        bench.say(f"fairness, {name}: the neighbour faults {beside.rate():,.0f} times a second")
        figures += rounds.figures(ways[1].name, P99, {ALONE: BOUND})
        figures += rounds.figures(ways[1].name, P50, {ALONE: None})
    return figures
