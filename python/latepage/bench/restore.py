"""A VM restored until its guest has touched a tenth of its memory at random, or all of it in sequence.

A word a page, so that the guest's own time hides nothing; from before the VM connects to the last touch, with the pager up
already. The memory file is in the page cache (hot) or was dropped from it (cold). `best_filler` says what the best C is.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from latepage.bench.bench import Bench
from latepage.bench.best_filler import Filler, best_filler
from latepage.bench.figures import Figure, Metric
from latepage.bench.machine import LackingError, cores, need_userfaultfd
from latepage.bench.memory_file import cool, warm
from latepage.bench.processes import Pager, ask, server
from latepage.bench.restore_kvm import measure_kvm
from latepage.bench.rounds import Run, Way

__all__ = ["measure"]

TIME = Metric("time", "ms")
ROUNDS = 5

BEST, ONE_PAGE, LAZY, READ = "best C by userfaultfd", "C, a page a fault", "lazy mmap", "read in first"

WAYS = {"as it is": (), "background": ("--populate", "background")}
"""Flags of `latepage serve`, by what figures call them."""


@dataclass(frozen=True, slots=True)
class Case:
    """What the guest touches, and where the memory file is then.

    Attributes:
        name: what figures call it.
        random: whether a tenth at random, or all in sequence.
        cold: whether the file has been dropped from the page cache.
        pinned: whether the guest's thread is pinned to a core, in all ways. Ours are not told where.
        bounds: what our time must not exceed, by peer.
    """

    name: str
    random: bool
    cold: bool
    pinned: bool
    bounds: Mapping[str, float | None]


IN_SEQUENCE = "in sequence, hot"

HOT: Mapping[str, float | None] = {BEST: 1.15, ONE_PAGE: None, LAZY: None, READ: None}
WALKED: Mapping[str, float | None] = {**HOT, ONE_PAGE: 0.25}
"""What is demanded of a hot file; one handler's page a fault is no match for a guest that walks."""

CASES = (
    Case("a tenth, hot", random=True, cold=False, pinned=False, bounds=HOT),
    Case("a tenth, hot, guest pinned", random=True, cold=False, pinned=True, bounds=HOT),
    Case(IN_SEQUENCE, random=False, cold=False, pinned=False, bounds=WALKED),
    Case("in sequence, hot, guest pinned", random=False, cold=False, pinned=True, bounds={**WALKED, ONE_PAGE: None}),
    Case("a tenth, cold", random=True, cold=True, pinned=False, bounds={**HOT, LAZY: 1.0}),
    Case("in sequence, cold", random=False, cold=True, pinned=False, bounds={**WALKED, LAZY: 1.0}),
)

SHARE = 0.8 / len(CASES)
"""Of the question's time, for each; the rest is KVM's."""


def measure(bench: Bench) -> list[Figure]:
    """Runs it."""
    need_userfaultfd()
    figures: list[Figure] = []
    memory = bench.memory_file(bench.sized(256 << 20, 4 << 20))
    fillers: dict[str, Filler] = {}
    for number, case in enumerate(CASES):
        restores = Restores(bench, memory, case)
        try:
            fillers[case.name] = restores.best((number * SHARE, (number + 0.3) * SHARE))
            figures += restores.measure(fillers[case.name], ((number + 0.3) * SHARE, (number + 1) * SHARE))
        except LackingError as why:
            bench.leave_out(f"restore, {case.name}", why)
    try:
        # One handler's page a fault takes little beside what an emulated guest takes by itself: its bound is for threads.
        peers = {BEST: 1.15, ONE_PAGE: None, LAZY: None}
        figures += measure_kvm(bench, fillers[IN_SEQUENCE], peers, (), (len(CASES) * SHARE, 1.0))
    except LackingError as why:
        bench.leave_out("restore, KVM", why)
    return figures


class Restores:
    """The ways of one case."""

    def __init__(self, bench: Bench, memory: Path, case: Case) -> None:
        self.bench, self.memory, self.case = bench, memory, case
        self.size = memory.stat().st_size
        self.limit = bench.folder / "limit.sock"

    def best(self, part: tuple[float, float]) -> Filler:
        """The best C by userfaultfd."""
        case = self.case
        self.settle()
        best = best_filler(
            lambda filler: self._filled(filler)["time"],
            random=case.random,
            cold=case.cold,
            pinned=case.pinned,
            few=self.bench.quick,
            tell=lambda share, what: self.bench.tell(part[0] + share * (part[1] - part[0]), f"{case.name}: {what}"),
        )
        self.bench.say(f"restore, {case.name}: the best C is {best}")
        return best

    def measure(self, best: Filler, part: tuple[float, float]) -> list[Figure]:
        """All of its figures."""
        case = self.case
        with ExitStack() as stack:
            ways = [
                Way(BEST, lambda: self._filled(best), peer=True),
                Way(ONE_PAGE, self._one_page, peer=True),
                Way(LAZY, lambda: self._alone("map"), peer=True),
                Way(READ, lambda: self._alone("read"), peer=True),
                *(Way(f"{case.name}, {name}", self._ours(stack, flags)) for name, flags in WAYS.items()),
            ]
            rounds = self.bench.in_turns("restore", ways, ROUNDS, part)
        figures: list[Figure] = []
        # The best C is the best of many for the case, and a user of ours may choose too: the bounds hold for the better way.
        better = min(WAYS, key=lambda name: median(rounds.each(f"{case.name}, {name}", TIME)))
        for name in WAYS:
            bounds = case.bounds if name == better else dict.fromkeys(case.bounds)
            figures += rounds.figures(f"{case.name}, {name}", TIME, bounds)
        return figures

    def settle(self) -> None:
        """Brings the memory file to where the case wants it."""
        if self.case.cold:
            cool(self.memory)
        else:
            warm(self.memory)

    def guest(self, origin: str, place: Path) -> Mapping[str, float]:
        """Restores once."""
        touches = self.size // 4096 // (10 if self.case.random else 1)
        order = ("random",) if self.case.random else ()
        if self.case.pinned:
            order = (*order, f"cpu={cores()[-1]}")
        said: dict[str, Any] = ask(
            self.bench.programs["guest"], origin, place, str(self.size), f"touches={touches}", *order
        )  # fmt: skip
        return {"time": said["ns"] / 1e6}

    def _alone(self, origin: str) -> Mapping[str, float]:
        self.settle()
        return self.guest(origin, self.memory)

    def _served(self, program: str, options: tuple[str, ...]) -> Mapping[str, float]:
        command: tuple[str | Path, ...] = (self.bench.programs[program], self.limit, self.memory, str(self.size), *options)
        # Programs that map a hot file do so before anybody connects; a cold one is dropped when they are up.
        if not self.case.cold:
            self.settle()
        with server(*command, socket=self.limit):
            if self.case.cold:
                self.settle()
            return self.guest("copy", self.limit)

    def _one_page(self) -> Mapping[str, float]:
        return self._served("server", ("cold",) if self.case.cold else ())

    def _filled(self, filler: Filler) -> Mapping[str, float]:
        return self._served("filler", filler.options)

    def _ours(self, stack: ExitStack, flags: tuple[str, ...]) -> Run:
        pager = stack.enter_context(Pager(self.bench.socket(), self.memory, *flags))

        def run() -> Mapping[str, float]:
            self.settle()
            took = self.guest("copy", pager.socket)
            pager.event("ended")
            return took

        return run
