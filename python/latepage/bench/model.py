"""Pages a second that a model foretells for hosts of many cores, from costs measured here; and its misses where rates are known.

The model is `queueing`; docs/scaling.md says what is in it and what is not.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from latepage.bench.bench import Bench
from latepage.bench.crowd import ours
from latepage.bench.figures import Figure, Metric, spread_of
from latepage.bench.machine import LackingError, cores, described, need_userfaultfd, two_cores
from latepage.bench.model_report import forecast_table
from latepage.bench.processes import Pager
from latepage.bench.published import SERIES, Series
from latepage.bench.queueing import Costs, Network, foretell, scaled_to
from latepage.bench.rounds import Rounds, Way

__all__ = ["Measured", "costs_of", "forecasts", "measure", "network"]

RATE = Metric("rate", "k pages/s", "more")
CPU, SERVED = Metric("CPU a fault", "µs"), Metric("of it the pager's", "µs")
ROUNDS = 3
COUNTS = (1, 2, 8, 64, 256, 512, 1024)
FEW, SOME, MANY = 8, 64, 1024
FITTED = {"uffd": {1, SOME, MANY}, "sharded": {SOME}, "exit": {FEW, SOME}, "notify": {1, SOME, MANY}}
"""Where costs are taken from: only what lies elsewhere is foretold."""

DELIVERIES = ("uffd", "sharded", "exit", "notify")
SHARD, WORKERS = 16, 4
"""Threads for each userfaultfd, where there are several; and threads that read them, at most."""

SHARED = {"uffd": 0.46, "sharded": 1.42, "exit": 0.46, "notify": 0.46}
"""µs for which a fault holds up all others of its address space. Two cores cannot tell: it is what 64 vCPUs on 48 cores come to
in the published series, by exits and with many userfaultfds."""

QUICK_LOCK = 0.24
"""µs of the same, at the least: by exits the published host of 256 cores reached 4,134 thousand pages a second, one in 0.24 µs.
What is foretold of `exit` on many cores is hardly more than this constant, so that both are shown."""

KNOWN_ON, KNOWN_BY = 48, 64
"""Cores and vCPUs there."""

WITHIN = 2.0
"""By what factor it may be off."""

FORETOLD = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HOSTS = (16, 64, 256)


@dataclass(frozen=True, slots=True)
class Measured:
    """One delivery at one number of threads.

    Attributes:
        rate: thousand pages a second.
        own: µs of CPU a fault, of the threads.
        served: µs of CPU a fault, of whoever serves them.
        spread: of the rate over the rounds, as a share.
        rounds: how many.
    """

    rate: float
    own: float
    served: float
    spread: float = 0.0
    rounds: int = 1


def measure(bench: Bench) -> list[Figure]:
    """Runs it."""
    need_userfaultfd()
    with ExitStack() as stack:
        measured = _measure(bench, stack)
    here = len(cores())
    costs = {delivery: costs_of(delivery, of) for delivery, of in measured.items()}
    # Several userfaultfds differ from one by how many wait at each.
    costs["sharded"] = replace(costs["sharded"], waiter=costs["uffd"].waiter, idle=costs["uffd"].idle)
    found: list[Figure] = []
    for delivery, of in measured.items():
        for count, what in of.items():
            told = foretell(costs[delivery], network(delivery, count, here)) / 1e3
            bound = None if count in FITTED[delivery] else WITHIN
            way = f"{delivery}, {count:,} thread" + ("s" if count > 1 else "")
            found.append(_beside(way, told, "measured here", what.rate, bound, what.rounds, what.spread))
    for series in SERIES:
        found += against(series, replace(costs["exit" if series.delivery == "exit" else "uffd"], shared=SHARED[series.delivery]))
    quick = {f"exit, m {QUICK_LOCK}": replace(costs["exit"], shared=QUICK_LOCK)}
    told_ahead = {host: forecasts(costs | quick, host) for host in hosts(here)}
    bench.more += [forecast_table(told_ahead), described()]

    def picture(path: Path) -> None:
        from latepage.bench.model_report import draw_forecasts

        rates = {delivery: {count: what.rate for count, what in of.items()} for delivery, of in measured.items()}
        draw_forecasts(told_ahead, here, rates, path)

    bench.picture = picture
    return found


def hosts(here: int) -> list[int]:
    """Cores of the hosts that are foretold; one core foretells only itself, since it cannot tell what waking another costs."""
    return sorted({here, *HOSTS}) if here > 1 else [here]


def network(delivery: str, threads: int, hosts_cores: float) -> Network:
    """So many threads on a host of so many cores, served as latepage does by that delivery."""
    if delivery == "sharded":
        shards = max(1, threads // SHARD)
        return Network(threads, hosts_cores, servers=max(1, int(min(WORKERS, shards, hosts_cores))), queues=shards)
    return Network(threads, hosts_cores)


def costs_of(delivery: str, measured: Mapping[int, Measured]) -> Costs:
    """What a fault costs, from rates and CPU at few, some and many threads.

    CPU is that of few threads (where those were measured) or of some, whichever is less: there nobody is woken in vain. A further
    waiter costs by how much a fault takes longer with many than with some. A sleeping server costs by how much one thread's fault
    takes longer than its CPU.
    """
    some, most = measured[SOME], max(measured)
    busy = min((measured.get(FEW, some), some), key=lambda what: what.own + what.served)
    costs = Costs(own=busy.own, served=busy.served, shared=SHARED[delivery])
    if not busy.served:
        return costs
    longer = 1e3 / measured[most].rate - 1e3 / some.rate
    idle = 1e3 / measured[1].rate - busy.own - busy.served if 1 in measured else 0.0
    return replace(costs, waiter=max(0.0, longer / (most - SOME)), idle=max(0.0, idle))


def forecasts(costs: Mapping[str, Costs], host: int) -> dict[str, dict[int, float]]:
    """Thousand pages a second by delivery and number of vCPUs, on a host of so many cores."""
    return {
        delivery: {count: foretell(of, network(delivery, count, host)) / 1e3 for count in FORETOLD}
        for delivery, of in costs.items()
    }


def against(series: Series, costs: Costs) -> list[Figure]:
    """A published series: its first rate says how fast that machine is, and what it costs to wait is what it costs here.

    Where each thread has a queue to itself or none, nothing of what was measured here is left in that.
    """
    peer = f"published; from here: {'w' if series.delivery == 'uffd' else 'nothing'}"
    first = min(series.rates)

    def there(count: int) -> Network:
        # One reader for each userfaultfd, as those tests have it.
        several = count if series.delivery == "sharded" else 1
        return Network(count, series.cores, servers=several, queues=several)

    fitted = {first, KNOWN_BY} if series.cores == KNOWN_ON and series.delivery != "uffd" else {first}
    scaled = scaled_to(1e3 * series.rates[first], replace(costs, idle=0.0), there(first))
    return [
        _beside(
            f"{series.name}, {count} vCPU" + ("s" if count > 1 else ""),
            foretell(scaled, there(count)) / 1e3, peer, rate, None if count in fitted else WITHIN, 1, 0.0,
        )
        for count, rate in series.rates.items()
    ]  # fmt: skip


def _beside(way: str, told: float, peer: str, known: float, bound: float | None, rounds: int, spread: float) -> Figure:
    """Its ratio is by what factor they differ, whichever is the larger one."""
    ratio = max(told, known) / max(1e-9, min(told, known))
    return Figure("model", way, RATE.name, RATE.unit, told, peer, known, ratio, bound, 1.0, rounds, spread)


def _measure(bench: Bench, stack: ExitStack) -> dict[str, dict[int, Measured]]:
    memory = bench.memory_file(bench.sized(64 << 20, 8 << 20))
    flags = ("--fault-around", "4KiB")
    pager = stack.enter_context(Pager(bench.socket(), memory, *flags))
    ways: dict[tuple[str, int], Way] = {}
    for count in bench.sized(COUNTS, (1, FEW, SOME, MANY)):
        touches = bench.sized(min(16384, max(1024, 1024 * count)), max(256, count))
        for delivery in DELIVERIES:
            if delivery == "sharded" and count <= SHARD:
                continue
            sent, shards = ("uffd", count // SHARD) if delivery == "sharded" else (delivery, 1)
            run = partial(ours, sent, memory, touches, count, None if sent == "exit" else pager, shards=shards)
            ways[delivery, count] = Way(f"{delivery}, {count}", run)
    try:
        core, other = two_cores()
    except LackingError as why:
        bench.leave_out("model: what it costs to wake a server on another core, and so hosts of more cores", why)
    else:
        # Otherwise it is chance whether the two share a core.
        apart = stack.enter_context(Pager(bench.socket(), memory, *flags, "--placement", "block", cores=(other,)))
        for delivery in ("uffd", "notify"):
            run = partial(ours, delivery, memory, bench.sized(1024, 256), 1, apart, core=core)
            ways[delivery, 1] = Way(f"{delivery}, 1", run)
    rounds = bench.in_turns("model", list(ways.values()), ROUNDS)
    found: dict[str, dict[int, Measured]] = {delivery: {} for delivery in DELIVERIES}
    for (delivery, count), way in ways.items():
        found[delivery][count] = _middle(rounds, way.name)
    return found


def _middle(rounds: Rounds, way: str) -> Measured:
    rates = rounds.each(way, RATE)
    cpu, served = median(rounds.each(way, CPU)), median(rounds.each(way, SERVED))
    return Measured(median(rates), cpu - served, served, spread_of(rates), len(rates))
