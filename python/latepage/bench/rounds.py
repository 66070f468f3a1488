"""Ways taken in turns: in every round each way once, and each peer twice, before the ways and after them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from latepage.bench.figures import Figure, Metric, compare, error_of, hold_against

__all__ = ["Rounds", "Run", "Way", "in_turns"]

Run = Callable[[], Mapping[str, float]]
"""Measures once; gives values by the names of metrics."""


@dataclass(frozen=True, slots=True)
class Way:
    """Something to measure.

    Attributes:
        name: what figures call it.
        run: measures it once.
        peer: whether ratios are taken to it, so that it is run twice in each round.
    """

    name: str
    run: Run
    peer: bool = False


@dataclass(slots=True)
class Rounds:
    """What all rounds gave.

    Attributes:
        question: which bench.
        runs: by way, for each round, what each of its runs gave.
    """

    question: str
    runs: dict[str, list[list[Mapping[str, float]]]] = field(default_factory=dict)

    def __contains__(self, way: str) -> bool:
        return way in self.runs

    def values(self, way: str, metric: Metric) -> list[list[float]]:
        """For each round, what each run of a way gave."""
        return [[run[metric.name] for run in round_] for round_ in self.runs[way]]

    def each(self, way: str, metric: Metric) -> list[float]:
        """For each round, the mean of a way's runs."""
        return [sum(round_) / len(round_) for round_ in self.values(way, metric)]

    def error(self, peer: str, metric: Metric) -> float:
        """A/A of a peer."""
        return error_of(self.values(peer, metric))

    def figure(self, way: str, metric: Metric, peer: str, bound: float | None = None) -> Figure:
        """A way beside a peer."""
        return compare(self.question, way, metric, self.each(way, metric), peer, self.values(peer, metric), bound)

    def figures(self, way: str, metric: Metric, bounds: Mapping[str, float | None]) -> list[Figure]:
        """A way beside each of some peers, as far as they were measured; the bounds by peer."""
        if way not in self:
            return []
        return [self.figure(way, metric, peer, bound) for peer, bound in bounds.items() if peer in self]

    def against(self, way: str, metric: Metric, demanded: str, limit: float, error: float = 1.0) -> Figure:
        """A way beside what is demanded of it in so many words."""
        return hold_against(self.question, way, metric, self.each(way, metric), demanded, limit, error)


def in_turns(
    question: str,
    ways: Sequence[Way],
    rounds: int,
    tell: Callable[[float, str], None] = lambda _share, _what: None,
) -> Rounds:
    """Measures all ways in turns.

    In each round the peers come first and once more at the end, so that a machine that gets slower meanwhile shows as their
    error; the ways between them start with another one each round, so that none always follows the same neighbour.

    Args:
        question: which bench.
        ways: all of them, the peers among them.
        rounds: how many.
        tell: is told the share that is done, and what comes next.
    """
    peers = [way for way in ways if way.peer]
    others = [way for way in ways if not way.peer]
    result = Rounds(question, {way.name: [] for way in ways})
    steps, done = rounds * (len(others) + 2 * len(peers)), 0
    for number in range(rounds):
        turn = number % len(others) if others else 0
        taken: dict[str, list[Mapping[str, float]]] = {way.name: [] for way in ways}
        for way in (*peers, *others[turn:], *others[:turn], *peers):
            tell(done / steps, way.name)
            taken[way.name].append(way.run())
            done += 1
        for name, runs in taken.items():
            result.runs[name].append(runs)
    tell(1.0, "")
    return result
