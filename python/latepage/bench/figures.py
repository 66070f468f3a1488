"""What came of a question: figures as ratios to a peer, what bounds them, and how far the machine's own noise goes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any, Literal

__all__ = ["Figure", "Metric", "compare", "error_of", "hold_against", "spread_of"]


@dataclass(frozen=True, slots=True)
class Metric:
    """Something that is measured.

    Attributes:
        name: what it is, as in `p50`.
        unit: what it is counted in.
        better: whether less or more of it is better.
    """

    name: str
    unit: str
    better: Literal["less", "more"] = "less"

    def ratio(self, ours: float, theirs: float) -> float:
        """Ours to theirs, turned so that smaller is better.

        >>> Metric("p50", "µs").ratio(10, 5), Metric("rate", "GB/s", "more").ratio(10, 5)
        (2.0, 0.5)
        """
        above, below = (ours, theirs) if self.better == "less" else (theirs, ours)
        return above / below if below else float("inf")


@dataclass(frozen=True, slots=True)
class Figure:
    """One way beside one peer, by one metric.

    Attributes:
        question: which bench.
        way: what was measured.
        metric: by what.
        unit: of `value` and `limit`.
        value: the median over the rounds.
        peer: whose figure `limit` is.
        limit: the median over the rounds; where it is demanded and not measured, that.
        ratio: the median over the rounds of ours to the peer's, turned so that smaller is better.
        bound: what the ratio must not exceed, before the error; None where nothing is demanded.
        error: A/A: the median over the rounds of what two runs of the peer in one round differed by, as a factor of at least 1.
        rounds: how many there were.
        spread: of `value`: what lies between its quartiles, as a share of the median.
    """

    question: str
    way: str
    metric: str
    unit: str
    value: float
    peer: str
    limit: float
    ratio: float
    bound: float | None
    error: float
    rounds: int
    spread: float

    @property
    def allowed(self) -> float | None:
        """The bound, with the error that the machine makes; None where nothing is demanded."""
        return None if self.bound is None else self.bound * self.error

    @property
    def holds(self) -> bool | None:
        """Whether the ratio is within what is allowed; None where nothing is demanded."""
        return None if self.allowed is None else self.ratio <= self.allowed

    def to_json(self) -> dict[str, Any]:
        """Its fields by name; without `bound` where nothing is demanded.

        >>> figure = Figure("faults", "block", "p50", "µs", 40.0, "C", 38.0, 1.05, None, 1.1, 5, 0.2)
        >>> list(figure.to_json())
        ['question', 'way', 'metric', 'unit', 'value', 'peer', 'limit', 'ratio', 'error', 'rounds', 'spread']
        """
        return {name: value for name, value in asdict(self).items() if value is not None}


def compare(
    question: str,
    way: str,
    metric: Metric,
    ours: Sequence[float],
    peer: str,
    theirs: Sequence[Sequence[float]],
    bound: float | None = None,
) -> Figure:
    """A figure from the rounds: each round's ratio is ours to the mean of the peer's runs in that round.

    Args:
        question: which bench.
        way: what was measured.
        metric: by what.
        ours: one value a round.
        peer: whose runs `theirs` are.
        theirs: for each round, what each of the peer's runs gave.
        bound: what the ratio must not exceed.

    >>> compare("faults", "block", Metric("p50", "µs"), [44, 60, 40], "C", [(40, 40), (44, 36), (42, 38)], 1.05).ratio
    1.1
    """
    means = [sum(runs) / len(runs) for runs in theirs]
    ratios = [metric.ratio(own, mean) for own, mean in zip(ours, means, strict=True)]
    return Figure(
        question, way, metric.name, metric.unit, float(median(ours)), peer, median(means), median(ratios), bound,
        error_of(theirs), len(ours), spread_of(ours),
    )  # fmt: skip


def hold_against(
    question: str,
    way: str,
    metric: Metric,
    ours: Sequence[float],
    demanded: str,
    limit: float,
    error: float = 1.0,
) -> Figure:
    """A figure beside what is demanded in so many words, not measured: its ratio may be 1.

    >>> hold_against("handshake", "1 VM", Metric("p50", "ms"), [0.4, 0.5, 0.6], "demanded", 1.0, 1.2).ratio
    0.5
    """
    value = float(median(ours))
    ratio = metric.ratio(value, limit)
    spread = spread_of(ours)
    return Figure(question, way, metric.name, metric.unit, value, demanded, limit, ratio, 1.0, error, len(ours), spread)


def error_of(runs: Sequence[Sequence[float]]) -> float:
    """A/A: the median over rounds of the largest to the smallest of one peer's runs in one round.

    >>> error_of([(10, 11), (10, 10), (12, 10)])
    1.1
    >>> error_of([(10,), (12,)])
    1.0
    """
    return float(median(max(round_) / min(round_) if min(round_) > 0 else 1.0 for round_ in runs))


def spread_of(values: Sequence[float]) -> float:
    """What lies between the quartiles, as a share of the median.

    >>> spread_of([1.0, 2.0, 3.0])
    0.5
    >>> spread_of([5.0])
    0.0
    """
    middle = median(values)
    if len(values) < 2 or not middle:
        return 0.0
    first, _, third = quantiles(values, n=4, method="inclusive")
    return float((third - first) / middle)
