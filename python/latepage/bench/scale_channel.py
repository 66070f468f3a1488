"""What the channel costs, taken apart, and where spinning on either side pays.

One thread posts, another fills; both say when they were where. Then crowds whose threads spin before they sleep.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from latepage.bench.bench import Bench
from latepage.bench.crowd import channel_steps, ours
from latepage.bench.figures import Figure, Metric, compare
from latepage.bench.machine import LackingError, cores, two_cores
from latepage.bench.processes import Pager
from latepage.bench.rounds import Way

__all__ = ["measure_channel", "measure_spins"]

STEPS = ("post", "notice", "install", "release", "wake", "expose")
ALL, RATE, CPU = Metric("all", "µs"), Metric("rate", "k pages/s", "more"), Metric("CPU a fault", "µs")
ROUNDS = 3
SPINS = 5000
"""Looks before somebody sleeps: as many as outlast a page on another core."""

BOTH_SLEEP = "channel, other core, both sleep"


def measure_channel(bench: Bench, part: tuple[float, float]) -> list[Figure]:
    """The steps of a page, each beside the whole of it, by how the two sides wait and where they run."""
    here = cores()[-1]
    ways = [_way(bench, "channel, same core", (here, here), 0, 0)]
    try:
        apart = two_cores()
    except LackingError as why:
        bench.leave_out("scale: the channel's two sides on two cores", why)
    else:
        ways += [
            _way(bench, BOTH_SLEEP, apart, 0, 0, peer=True),
            _way(bench, "channel, other core, reader spins", apart, 0, SPINS),
            _way(bench, "channel, other core, owner spins", apart, SPINS, 0),
            _way(bench, "channel, other core, both spin", apart, SPINS, SPINS),
        ]
    rounds = bench.in_turns("scale", ways, ROUNDS, part)
    found: list[Figure] = []
    for way in ways:
        whole = rounds.values(way.name, ALL)
        for name in STEPS:
            step = Metric(name, "µs")
            found.append(compare("scale", way.name, step, rounds.each(way.name, step), "all of it", whole))
        if not way.peer:
            found += rounds.figures(way.name, ALL, {BOTH_SLEEP: None})
    return found


def _way(bench: Bench, name: str, where: tuple[int, int], owner: int, reader: int, *, peer: bool = False) -> Way:
    pages = bench.sized(1000, 50)

    def run() -> Mapping[str, float]:
        # A side that went on before the other one was done with its step has waited for nothing.
        times = channel_steps(pages, owner_spins=owner, reader_spins=reader, cores=where)
        return {step: max(0.0, took) for step, took in times.items()}

    return Way(name, run, peer)


def measure_spins(bench: Bench, memory: Path, pager: Pager, named: Mapping[int, str], part: tuple[float, float]) -> list[Figure]:
    """Crowds whose threads look so many times before they sleep, beside those that sleep at once.

    Args:
        bench: what a question is given.
        memory: the memory file.
        pager: who serves it.
        named: what each number of threads is called.
        part: of the question's progress.
    """
    found: list[Figure] = []
    for number, (count, words) in enumerate(named.items()):
        touches = bench.sized(min(16384, 1024 * count), 256)
        run = partial(ours, "notify", memory, touches, count, pager)
        sleeping, spinning = f"notify, {words}, no spin", f"notify, {words}, owners spin"
        ways = [Way(sleeping, partial(run, 0), peer=True), Way(spinning, partial(run, SPINS))]
        share = (part[1] - part[0]) / len(named)
        rounds = bench.in_turns("scale", ways, ROUNDS, (part[0] + number * share, part[0] + (number + 1) * share))
        for metric in (RATE, CPU):
            found += rounds.figures(spinning, metric, {sleeping: None})
    return found
