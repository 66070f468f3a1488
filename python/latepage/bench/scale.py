"""From one thread to a thousand that fault at the same time, by each delivery: pages a second, CPU a fault, and waits.

Threads touch pages in random order, each once, so that each is a fault of its own. How the access reaches whoever brings the page
differs. Memory is shared: by `uffd` and `exit` a page is copied in, by `notify` it is written, and continued by the thread.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from latepage.bench.bench import Bench
from latepage.bench.crowd import ours, theirs
from latepage.bench.figures import Figure, Metric
from latepage.bench.machine import LackingError, cores, need_userfaultfd, two_cores
from latepage.bench.placement import placed
from latepage.bench.processes import Pager
from latepage.bench.rounds import Rounds, Way
from latepage.bench.scale_channel import measure_channel, measure_spins
from latepage.bench.scale_kvm import measure_kvm

__all__ = ["COUNTS", "measure"]

RATE = Metric("rate", "k pages/s", "more")
CPU, P50, P99 = Metric("CPU a fault", "µs"), Metric("p50", "µs"), Metric("p99", "µs")
COUNTS = (1, 2, 8, 64, 256, 512, 1024)
ROUNDS = 3
MANY, GROWN, FEW = 512, 1024, 8
"""Where pages a second are held against each other; and CPU a fault at the most threads, to that at few."""

ONE, SHARDED, IN_THREAD, CHANNEL = "C, one userfaultfd", "C, sharded userfaultfds", "C, in the thread", "C, plain channel"
SHARD = 16
"""Threads for each userfaultfd, where there are several."""

EXIT_CPU = 1.2
MANY_TIMES = 1 / 3
NO_WORSE = 1 / 0.9
GROWTH = 1.5
ONE_THREAD = 1.1
SPINNING = (1, 8, 64)


def measure(bench: Bench) -> list[Figure]:
    """Runs it."""
    need_userfaultfd()
    counts = bench.sized(COUNTS, (1, 8, MANY))
    found: list[Figure] = []
    drawn: dict[str, dict[int, float]] = {}
    with ExitStack() as stack:
        crowds = Crowds(bench, stack)
        for number, count in enumerate(counts):
            part = (0.7 * number / len(counts), 0.7 * (number + 1) / len(counts))
            rounds = bench.in_turns("scale", crowds.ways(count), ROUNDS, part)
            found += figures_of(rounds, count)
            for way in rounds.runs:
                name = way.removesuffix(f", {threads(count)}")
                drawn.setdefault(name, {})[count] = sorted(rounds.each(way, RATE))[len(rounds.runs[way]) // 2]
        found += _growth(bench, crowds)
        found += crowds.one_thread((0.75, 0.8))
        found += measure_spins(bench, crowds.memory, crowds.pager, {count: threads(count) for count in SPINNING}, (0.8, 0.83))
    found += measure_channel(bench, (0.83, 0.86))
    try:
        found += measure_kvm(bench, (0.86, 1.0))
    except LackingError as why:
        bench.leave_out("scale, real vCPUs", why)

    def picture(path: Path) -> None:
        from latepage.bench.curves import draw_rates

        draw_rates("scale", "pages a second by the number of threads that fault at the same time; dashed: minimal C", drawn, path)

    bench.picture = picture
    return found


def threads(count: int) -> str:
    """How many, in words."""
    return f"{count:,} thread" + ("s" if count > 1 else "")


def touches_of(bench: Bench, count: int) -> int:
    """Pages that so many threads touch: as many as take a fraction of a second."""
    return bench.sized(min(16384, max(1024, 1024 * count)), max(256, 2 * count))


class Crowds:
    """The ways at each number of threads; pagers live as long as `stack`."""

    def __init__(self, bench: Bench, stack: ExitStack) -> None:
        self.bench = bench
        self.memory = bench.memory_file(bench.sized(64 << 20, 8 << 20))
        self.program = bench.programs["throng"]
        self.pager = stack.enter_context(Pager(bench.socket(), self.memory, "--fault-around", "4KiB"))

    def ways(self, count: int) -> list[Way]:
        """All of them; nothing is pinned."""
        named = threads(count)
        shards, readers = max(2, count // SHARD), min(4, len(cores()))
        found = [
            self.limit(ONE, count, "uffd"),
            self.limit(IN_THREAD, count, "thread"),
            self.limit(CHANNEL, count, "channel"),
        ]
        if count > SHARD:
            found.append(self.limit(SHARDED, count, "uffd", f"shards={shards}", f"servers={readers}"))
            found.append(Way(f"uffd in shards, {named}", self.ours("uffd", count, shards), peer=count == MANY))
        found.append(Way(f"uffd, {named}", self.ours("uffd", count), peer=count == MANY))
        return [*found, Way(f"exit, {named}", self.ours("exit", count)), Way(f"notify, {named}", self.ours("notify", count))]

    def limit(self, name: str, count: int, way: str, *options: str) -> Way:
        """The C program."""
        touches = touches_of(self.bench, count)
        return Way(name, partial(theirs, self.program, way, self.memory, touches, count, *options), peer=True)

    def ours(self, delivery: str, count: int, shards: int = 1) -> "partial[Mapping[str, float]]":
        """A crowd of ours."""
        pager = None if delivery == "exit" else self.pager
        return partial(ours, delivery, self.memory, touches_of(self.bench, count), count, pager, shards=shards)

    def one_thread(self, part: tuple[float, float]) -> list[Figure]:
        """One thread by the channel, beside the same by userfaultfd: the pager blocks on another core, or on the same."""
        found: list[Figure] = []
        here = cores()[-1]
        for number, (placement, flag) in enumerate({"block": "block", "same core": "same-core"}.items()):
            try:
                core, other = two_cores() if flag == "block" else (here, None)
                flags = placed(flag)
            except LackingError as why:
                self.bench.leave_out(f"scale, one thread, {placement}", why)
                continue
            # A thread that spins on the pager's core keeps it from what it waits for.
            kept, spins = (None, 0) if other is None else ((other,), None)
            with Pager(self.bench.socket(), self.memory, "--fault-around", "4KiB", *flags, cores=kept) as pager:
                touches = touches_of(self.bench, 1)
                uffd, notify = (f"{delivery}, 1 thread, {placement}" for delivery in ("uffd", "notify"))
                ways = [
                    Way(uffd, partial(ours, "uffd", self.memory, touches, 1, pager, core=core), peer=True),
                    Way(notify, partial(ours, "notify", self.memory, touches, 1, pager, spins, core)),
                ]
                half = (part[1] - part[0]) / 2
                within = (part[0] + number * half, part[0] + (number + 1) * half)
                rounds = self.bench.in_turns("scale", ways, 2 * ROUNDS + 1, within)
            found += rounds.figures(notify, P50, {uffd: ONE_THREAD})
            found += rounds.figures(notify, P99, {uffd: None})
        return found


def figures_of(rounds: Rounds, count: int) -> list[Figure]:
    """What is held against what, at one number of threads."""
    named, many = threads(count), count == MANY
    uffd, shards, exit_, notify = (f"{way}, {named}" for way in ("uffd", "uffd in shards", "exit", "notify"))
    found = []
    for metric in (RATE, CPU, P50, P99):
        found += rounds.figures(uffd, metric, {ONE: None})
    beside_shards: dict[str, float | None] = {SHARDED: None}
    if many:
        beside_shards |= {uffd: MANY_TIMES}
    for metric in (RATE, CPU, P50, P99):
        found += rounds.figures(shards, metric, beside_shards if metric is RATE else {SHARDED: None})
    for metric in (RATE, CPU, P50, P99):
        found += rounds.figures(exit_, metric, {IN_THREAD: EXIT_CPU if metric is CPU else None})
    beside: dict[str, float | None] = {CHANNEL: None}
    if many:
        beside |= {uffd: MANY_TIMES, shards: NO_WORSE, SHARDED: None}
    for metric in (RATE, CPU, P50, P99):
        found += rounds.figures(notify, metric, beside if metric is RATE else {CHANNEL: None})
    return found


def _growth(bench: Bench, crowds: Crowds) -> list[Figure]:
    """CPU a fault of the channel, with many threads beside few."""
    few, many = f"notify, {threads(FEW)}", f"notify, {threads(GROWN)}"
    ways = [Way(few, crowds.ours("notify", FEW), peer=True), Way(many, crowds.ours("notify", GROWN))]
    return bench.in_turns("scale", ways, ROUNDS, (0.7, 0.75)).figures(many, CPU, {few: GROWTH})
