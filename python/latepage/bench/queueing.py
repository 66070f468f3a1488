"""A model of faults as a closed queueing network: threads that think and fault, whoever serves them, and the cores of all.

`docs/scaling.md` derives the equations. Times are microseconds, rates are faults a microsecond unless said otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, inf, log, sqrt

__all__ = ["Costs", "Network", "foretell", "repairman", "scaled_to"]

STEPS = 40
"""Halvings of the interval in which a fixed point lies: more than a float can tell."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a fault costs, in µs.

    Attributes:
        own: CPU of the thread that faults: into the kernel, asleep and awake again, on.
        served: CPU of whoever serves it; 0 where nobody does.
        waiter: by how much that grows for each further thread that waits in the same queue.
        idle: how much longer it takes where the server slept: it is woken on another core, and so is the thread.
        shared: what all faults of one address space do one after the other, in the kernel's locks.
    """

    own: float
    served: float = 0.0
    waiter: float = 0.0
    idle: float = 0.0
    shared: float = 0.0


@dataclass(frozen=True, slots=True)
class Network:
    """Who faults, and where.

    Attributes:
        threads: threads or vCPUs that fault.
        cores: cores of the host.
        servers: threads that serve.
        queues: queues in the kernel, over which the waiting spread evenly.
        think: µs of a guest's own work between two faults.
    """

    threads: int
    cores: float = inf
    servers: int = 1
    queues: int = 1
    think: float = 0.0


def repairman(threads: int, away: float, service: Callable[[int], float]) -> float:
    """The rate of one server: threads stay away for `away` in the mean, then queue; with n there, one takes `service(n)`.

    The birth-death process of the machine repairman, both times exponential.

    >>> round(repairman(1, 3.0, lambda _: 1.0), 6), round(repairman(2, 1.0, lambda _: 1.0), 6)
    (0.25, 0.8)
    """
    if threads == 0:
        return 0.0
    if away <= 0:
        return 1 / service(threads)
    weights, times = [0.0], [inf]  # the logarithm of the probability that n are there, but for a constant
    for n in range(1, threads + 1):
        time = service(n)
        times.append(time)
        weights.append(weights[-1] + log((threads - n + 1) * time / away))
    most = max(weights)
    shares = [exp(weight - most) for weight in weights]
    return sum(share / time for share, time in zip(shares, times, strict=True)) / sum(shares)


def foretell(costs: Costs, network: Network) -> float:
    """Pages a second.

    >>> costs = Costs(own=5.0, served=10.0, idle=35.0)
    >>> round(foretell(costs, Network(threads=1))), round(foretell(costs, Network(threads=512)))
    (20000, 100000)
    """
    # The rate that the network has when cores and locks are as busy as that rate makes them: it falls as they get busier.
    low, high = 0.0, _limit(costs, network)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if _rate_at(costs, network, middle) > middle:
            low = middle
        else:
            high = middle
    return 1e6 * low


def scaled_to(rate: float, costs: Costs, network: Network) -> Costs:
    """The costs of another machine, of which one rate is known: CPU is scaled until that comes out; waiters and locks stay.

    >>> costs = scaled_to(2e5, Costs(own=5.0, served=5.0), Network(threads=1))
    >>> round(costs.own, 3), round(foretell(costs, Network(threads=1)))
    (2.5, 200000)
    """
    low, high = 1e-3, 1e3
    for _ in range(STEPS):
        middle = sqrt(low * high)
        if foretell(_times(costs, middle), network) > rate:
            low = middle
        else:
            high = middle
    return _times(costs, low)


def _times(costs: Costs, factor: float) -> Costs:
    return replace(costs, own=costs.own * factor, served=costs.served * factor)


def _limit(costs: Costs, network: Network) -> float:
    """A rate that cannot be exceeded."""
    alone = costs.own + costs.served + network.think + costs.shared
    limits = [network.threads / alone, network.cores / (costs.own + costs.served + costs.shared)]
    if costs.served:
        limits.append(network.servers / costs.served)
    if costs.shared:
        limits.append(1 / costs.shared)
    return min(limits)


def _rate_at(costs: Costs, network: Network, rate: float) -> float:
    """The rate that comes of cores and locks as busy as `rate` makes them."""
    threads, servers = network.threads, min(network.servers, network.threads)
    others = (threads - 1) / threads  # whom a thread can meet: not itself
    held = others * rate * costs.shared
    locked = costs.shared / (1 - held) if held < 1 else inf
    away = network.think + costs.idle / 2 + costs.own
    waiting = max(1.0, (threads - rate * away) / servers)
    cpu = costs.own + costs.shared + _service(costs, network, servers, waiting)
    slower = _slowdown(others * rate * cpu / network.cores, network.cores)
    if inf in (locked, slower):
        return 0.0
    if not costs.served:
        return threads / (network.think + slower * costs.own + locked)

    def service(n: int) -> float:
        woken = costs.idle / 2 if n == 1 else 0.0
        return slower * _service(costs, network, servers, n) + woken

    away = network.think + costs.idle / 2 + slower * costs.own + locked
    each, more = divmod(threads, servers)
    total = (servers - more) * repairman(each, away, service)
    return total + (more * repairman(each + 1, away, service) if more else 0.0)


def _service(costs: Costs, network: Network, servers: int, waiting: float) -> float:
    """CPU for one fault of a server at which so many wait: those in the same queue make it slower."""
    beside = max(0.0, waiting * servers / max(network.queues, servers) - 1)
    return costs.served + costs.waiter * beside


def _slowdown(busy: float, cores: float) -> float:
    """How much longer work takes on cores that are busy to a share, shared fairly (Sakasegawa's approximation)."""
    if busy >= 1:
        return inf
    if cores == inf or busy <= 0:
        return 1.0
    return float(1 + busy ** (sqrt(2 * (cores + 1)) - 1) / (cores * (1 - busy)))
