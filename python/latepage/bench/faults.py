"""One fault of 4 KiB, as the guest's thread sees it, contents in memory: by COPY and by CONTINUE, and by placement.

A guest of one thread touches pages in random order, each once, and times every touch. Each page is a fault of its own here: ours
are told to bring nothing beside it.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from latepage.bench.bench import Bench
from latepage.bench.figures import Figure, Metric
from latepage.bench.machine import LackingError, cores, need_userfaultfd, two_cores
from latepage.bench.placement import placed
from latepage.bench.processes import Pager, ask, server
from latepage.bench.rounds import Way

__all__ = ["measure"]

P50, P99 = Metric("p50", "µs"), Metric("p99", "µs")
ROUNDS = 9

BLOCKING, SPINNING, SAME_CORE, ANYWHERE = "C blocking", "C spinning", "C same core", "C blocking, nothing pinned"

INSTALLS = {"copy": "COPY", "minor": "CONTINUE"}

BOUNDS: Mapping[str, Mapping[str, float | None]] = {
    "block": {BLOCKING: 1.05},
    "spin": {SPINNING: None, BLOCKING: None},
    "same core": {SAME_CORE: 1.10, BLOCKING: None},
    "auto": {BLOCKING: 0.5, ANYWHERE: None, SAME_CORE: None},
}
"""What the median of each placement must not exceed, by peer."""


def measure(bench: Bench) -> list[Figure]:
    """Runs it."""
    need_userfaultfd()
    figures: list[Figure] = []
    for number, install in enumerate(INSTALLS):
        with ExitStack() as stack:
            ways = Faults(bench, install, stack).ways()
            rounds = bench.in_turns("faults", ways, ROUNDS, (number / len(INSTALLS), (number + 1) / len(INSTALLS)))
        for placement, bounds in BOUNDS.items():
            way = f"{INSTALLS[install]}, {placement}"
            figures += rounds.figures(way, P50, bounds)
            # Whatever comes once in a hundred faults here is mostly the machine's.
            figures += rounds.figures(way, P99, dict.fromkeys(bounds))
    return figures


class Faults:
    """The ways of one install; pagers live as long as `stack`."""

    def __init__(self, bench: Bench, install: str, stack: ExitStack) -> None:
        self.bench, self.install, self.stack = bench, install, stack
        self.memory = bench.memory_file(bench.sized(64 << 20, 1 << 20))
        self.size = str(self.memory.stat().st_size)
        self.touches = bench.sized(2000, 100)

    def ways(self) -> list[Way]:
        """As many as the machine allows."""
        found = [self.limit(ANYWHERE)]
        core = cores()[-1]
        try:
            core, other = two_cores()
        except LackingError as why:
            what = f"faults, {INSTALLS[self.install]}: blocking and spinning on another core than the guest"
            self.bench.leave_out(what, why)
        else:
            found += [self.limit(BLOCKING, other, core), self.limit(SPINNING, other, core, "spin")]
            # Kept off the guest's core, as the C programs are: otherwise the scheduler decides, and no two runs are alike.
            found += [*self.ours("block", "block", core, other), *self.ours("spin", "spin", core, other)]
        found.append(self.limit(SAME_CORE, core, core))
        return [*found, *self.ours("same core", "same-core", core), *self.ours("auto", "auto")]

    def limit(self, name: str, cpu: int | None = None, guest: int | None = None, *how: str) -> Way:
        """A C program, on a core or anywhere, and the guest's core."""
        socket = self.bench.folder / "limit.sock"
        pinned = () if cpu is None else (f"cpu={cpu}",)

        def run() -> Mapping[str, float]:
            program = self.bench.programs["server"]
            with server(program, socket, self.memory, self.size, *how, *pinned, socket=socket):
                return self.guest(socket, guest)

        return Way(name, run, peer=True)

    def ours(self, placement: str, flag: str, guest: int | None = None, core: int | None = None) -> list[Way]:
        """A pager, kept to a core or not, and the guest's core; nothing where it knows no such placement."""
        name = f"{INSTALLS[self.install]}, {placement}"
        try:
            flags = ("--fault-around", "4KiB", *placed(flag))
        except LackingError as why:
            self.bench.leave_out(f"faults, {name}", why)
            return []
        kept = None if core is None else (core,)
        pager = self.stack.enter_context(Pager(self.bench.socket(), self.memory, *flags, cores=kept))

        def run() -> Mapping[str, float]:
            values = self.guest(pager.socket, guest)
            faults = pager.event("ended")["faults"]
            if faults < 0.99 * self.touches:
                self.bench.say(f"{name}: the pager saw {faults} faults for {self.touches} touches")
            return values

        return [Way(name, run)]

    def guest(self, socket: Path, cpu: int | None) -> Mapping[str, float]:
        """A guest's touches, once."""
        pinned = () if cpu is None else (f"cpu={cpu}",)
        program = self.bench.programs["guest"]
        said = ask(program, self.install, socket, self.size, "random", f"touches={self.touches}", *pinned)
        if said["there"] > self.touches // 100:
            self.bench.say(f"faults: {said['there']} of {self.touches} touches found their page there, and are not counted")
        return {"p50": said["p50"] / 1e3, "p99": said["p99"] / 1e3}
