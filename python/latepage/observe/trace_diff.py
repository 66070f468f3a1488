"""Two traces of VMs with the same memory, one against the other: what both touched, and whether in the same order."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from latepage.errors import TraceError
from latepage.memory import Region, format_size
from latepage.observe.trace_file import Trace, places

__all__ = ["Difference", "check_fit", "common_granule", "compare"]


@dataclass(frozen=True, slots=True)
class Difference:
    """What two traces have in common. Only touches count: what came beside them or ahead of them is no sign of use.

    A touch brings what lies beside it, and later touches of that do not show. So stretches of memory are compared within which
    one touch may hide others: each is as large as the larger of the two runs' fault-around windows, or one page where both
    brought nothing beside.

    Attributes:
        page_size: bytes of a page.
        granule: bytes of a stretch; those at the ends of a region may be shorter.
        both: stretches that both VMs touched, as ranges of page numbers, in the order in which the first did.
        only_a: stretches that only the first touched, in its order.
        only_b: stretches that only the second touched, in its order.
        ranks: for each of `both`, its place in the order in which the second VM touched them.
        jaccard: stretches that both touched, as a share of those that either did; None if there are none.
        order: how alike the orders are in which they touched what both did: Spearman's rank correlation, 1 for the same
            order, about 0 for unrelated ones, -1 for the reverse; None for fewer than two stretches.
        populated: whether population brought pages to either VM. Touches of those do not show at any granule.
    """

    page_size: int
    granule: int
    both: tuple[range, ...]
    only_a: tuple[range, ...]
    only_b: tuple[range, ...]
    ranks: tuple[int, ...]
    jaccard: float | None
    order: float | None
    populated: bool

    @property
    def unit(self) -> str:
        """What is counted, in words: `pages`, or `stretches of 64 KiB`."""
        return "pages" if self.granule == self.page_size else f"stretches of {format_size(self.granule)}"


def compare(a: Trace, b: Trace) -> Difference:
    """Compares what two VMs touched.

    Raises:
        TraceError: their memory is not laid out alike, so that their pages are not the same ones.
    """
    check_fit(a, b)
    granule = common_granule((a, b))
    first, second = (_stretches(trace.regions, trace.touches(), granule) for trace in (a, b))
    both = tuple(stretch for stretch in first if stretch in second)
    only_a = tuple(stretch for stretch in first if stretch not in second)
    only_b = tuple(stretch for stretch in second if stretch not in first)
    either = len(both) + len(only_a) + len(only_b)
    place = {stretch: rank for rank, stretch in enumerate(stretch for stretch in second if stretch in first)}
    ranks = tuple(place[stretch] for stretch in both)
    return Difference(
        max((region.page_size for region in a.regions), default=granule),
        granule,
        both,
        only_a,
        only_b,
        ranks,
        jaccard=len(both) / either if either else None,
        order=_correlation(ranks),
        populated=a.populated or b.populated,
    )


def common_granule(traces: Iterable[Trace]) -> int:
    """Bytes of the smallest aligned stretches of memory in which no touch is hidden by what came beside another one.

    Those of one run are its fault-around windows, aligned in the snapshot; those of several hold whole windows of each.
    """
    sizes = {region.page_size for trace in traces for region in trace.regions}
    return math.lcm(*sizes, *(trace.fault_around for trace in traces if trace.fault_around))


def _stretches(regions: Sequence[Region], pages: Iterable[int], granule: int) -> dict[range, None]:
    """The stretches that hold the pages, each once, in the order of its first page."""
    firsts = places(tuple(regions))
    found: dict[range, None] = {}
    for page in pages:
        at = bisect_right(firsts, page) - 1
        region = regions[at]
        offset = region.offset + (page - firsts[at]) * region.page_size
        start = offset - offset % granule - region.offset
        found[
            range(
                firsts[at] + max(0, -(-start // region.page_size)),
                firsts[at] + min(region.pages, -(-(start + granule) // region.page_size)),
            )
        ] = None
    return found


def _correlation(ranks: Sequence[int]) -> float | None:
    """Spearman's rank correlation of an order, as ranks in another one, with that one.

    >>> _correlation((0, 1, 2)), _correlation((2, 1, 0)), _correlation((0,))
    (1.0, -1.0, None)
    """
    count = len(ranks)
    if count < 2:
        return None
    squares = sum((rank - other) ** 2 for rank, other in enumerate(ranks))
    return 1 - 6 * squares / (count * (count * count - 1))


def check_fit(first: Trace, other: Trace) -> None:
    """Whether page numbers mean the same in both. Addresses in the VMM's process may differ: they do from run to run.

    Raises:
        TraceError: they do not; both files are named, and what differs.
    """

    def refuse(what: str) -> TraceError:
        return TraceError(f"{other.path} does not fit {first.path}: {what}; take traces of the same snapshot")

    if len(first.regions) != len(other.regions):
        raise refuse(f"{len(other.regions)} regions of memory, not {len(first.regions)}")
    for number, (ours, theirs) in enumerate(zip(first.regions, other.regions, strict=True)):
        for name in ("size", "offset", "page_size", "gpa"):
            was, is_ = getattr(ours, name), getattr(theirs, name)
            # A guest-physical address is not always known.
            if was != is_ and None not in (was, is_):
                raise refuse(f"region {number} has a {name.replace('gpa', 'guest-physical address')} of {is_:#x}, not {was:#x}")
