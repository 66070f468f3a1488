"""One fault of 4 KiB, as the guest's thread sees it, contents in memory: by COPY and by CONTINUE, and by placement.

A guest of one thread touches pages in random order, each once, and times every touch. Each page is a fault of its own here: ours
are told to bring nothing beside it.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from latepage.bench.bench import Bench
from latepage.bench.figures import Figure, Metric
from latepage.bench.machine import LackingError, need_userfaultfd, two_cores
from latepage.bench.placement import placed
from latepage.bench.processes import Pager, ask, server
from latepage.bench.rounds import Way

__all__ = ["measure"]

P50, P99 = Metric("p50", "µs"), Metric("p99", "µs")
ROUNDS = 9
TOUCHES = {False: 2000, True: 100}
"""In each run, by whether it is a quick one."""


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
        figures += _install(bench, install, (number / 2, (number + 1) / 2))
    return figures


def _install(bench: Bench, install: str, part: tuple[float, float]) -> list[Figure]:
    with ExitStack() as stack:
        ways = _ways(bench, install, stack)
        rounds = bench.in_turns("faults", ways, ROUNDS, part)
    figures: list[Figure] = []
    for placement, bounds in BOUNDS.items():
        way = f"{INSTALLS[install]}, {placement}"
        figures += rounds.figures(way, P50, bounds)
        # Whatever comes once in a hundred faults here is mostly the machine's.
        figures += rounds.figures(way, P99, dict.fromkeys(bounds))
    return figures


def _ways(bench: Bench, install: str, stack: ExitStack) -> list[Way]:
    here = None
    try:
        here, there = two_cores()
    except LackingError as why:
        bench.leave_out(f"faults, {INSTALLS[install]}: blocking and spinning on another core than the guest", why)
        core = 0

    def c(name: str, cpu: int | None, guest: int | None, *how: str) -> Way:
        return Way(name, _with_server(bench, install, cpu, guest, how), peer=True)

    def ours(placement: str, flag: str, guest: int | None, cores: tuple[int, ...] | None) -> list[Way]:
        name = f"{INSTALLS[install]}, {placement}"
        try:
            flags = ("--fault-around", "4KiB", *placed(flag))
        except LackingError as why:
            bench.leave_out(f"faults, {name}", why)
            return []
        pager = stack.enter_context(Pager(bench.socket(), _memory(bench), *flags, cores=cores))
        return [Way(name, _with_pager(bench, install, pager, guest))]

    ways: list[Way] = [c(ANYWHERE, None, None)]
    if here is not None:
        core = here
        ways += [c(BLOCKING, there, here), c(SPINNING, there, here, "spin")]
        # Kept off the guest's core, as the C programs are: otherwise the scheduler decides, and no two runs are alike.
        ways += [*ours("block", "block", here, (there,)), *ours("spin", "spin", here, (there,))]
    ways += [c(SAME_CORE, core, core)]
    ways += [*ours("same core", "same-core", core, None), *ours("auto", "auto", None, None)]
    return ways


def _memory(bench: Bench) -> Path:
    return bench.memory_file(bench.sized(64 << 20, 1 << 20))


def _guest(bench: Bench, install: str, socket: Path, cpu: int | None) -> Mapping[str, float]:
    size = _memory(bench).stat().st_size
    touches = TOUCHES[bench.quick]
    pinned = () if cpu is None else (f"cpu={cpu}",)
    said = ask(bench.programs["guest"], install, socket, str(size), "random", f"touches={touches}", *pinned)
    if said["there"] > touches // 100:
        bench.say(f"faults: {said['there']} of {touches} touches found their page there, and are not counted")
    return {"p50": said["p50"] / 1e3, "p99": said["p99"] / 1e3}


def _with_server(
    bench: Bench, install: str, cpu: int | None, guest: int | None, how: tuple[str, ...]
) -> Callable[[], Mapping[str, float]]:
    memory = _memory(bench)
    pinned = () if cpu is None else (f"cpu={cpu}",)
    command = (bench.programs["server"], bench.folder / "limit.sock", memory, str(memory.stat().st_size), *how, *pinned)

    def run() -> Mapping[str, float]:
        with server(*command, socket=bench.folder / "limit.sock"):
            return _guest(bench, install, bench.folder / "limit.sock", guest)

    return run


def _with_pager(bench: Bench, install: str, pager: Pager, guest: int | None) -> Callable[[], Mapping[str, float]]:
    def run() -> Mapping[str, float]:
        values = _guest(bench, install, pager.socket, guest)
        ended = pager.event("ended")
        touches = TOUCHES[bench.quick]
        if ended["faults"] < touches * 0.99:
            bench.say(f"faults: the pager saw {ended['faults']} faults for {touches} touches")
        return values

    return run
