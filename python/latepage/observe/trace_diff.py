"""Two traces of VMs with the same memory, one against the other: which pages both touched, and whether in the same order."""

from dataclasses import dataclass

from latepage.errors import TraceError
from latepage.observe.trace_file import Trace

__all__ = ["Difference", "check_fit", "compare"]


@dataclass(frozen=True, slots=True)
class Difference:
    """What two traces have in common. Only touches count: what came beside them or ahead of them is no sign of use.

    Attributes:
        both: pages that both VMs touched, in the order in which the first did.
        only_a: pages that only the first touched, in its order.
        only_b: pages that only the second touched, in its order.
        jaccard: pages that both touched, as a share of those that either did; None if there are none.
        order: how alike the orders are in which they touched what both did: Spearman's rank correlation, 1 for the same
            order, about 0 for unrelated ones, -1 for the reverse; None for fewer than two pages.
    """

    both: tuple[int, ...]
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    jaccard: float | None
    order: float | None


def compare(a: Trace, b: Trace) -> Difference:
    """Compares what two VMs touched.

    Raises:
        TraceError: their memory is not laid out alike, so that their pages are not the same ones.
    """
    check_fit(a, b)
    first, second = a.touches(), b.touches()
    both = tuple(page for page in first if page in second)
    only_a = tuple(page for page in first if page not in second)
    only_b = tuple(page for page in second if page not in first)
    either = len(both) + len(only_a) + len(only_b)
    return Difference(
        both,
        only_a,
        only_b,
        jaccard=len(both) / either if either else None,
        order=_correlation(both, tuple(page for page in second if page in first)),
    )


def _correlation(first: tuple[int, ...], second: tuple[int, ...]) -> float | None:
    """Spearman's rank correlation of two orders of the same pages.

    >>> _correlation((7, 8, 9), (7, 8, 9)), _correlation((7, 8, 9), (9, 8, 7)), _correlation((7,), (7,))
    (1.0, -1.0, None)
    """
    count = len(first)
    if count < 2:
        return None
    place = {page: rank for rank, page in enumerate(second)}
    squares = sum((rank - place[page]) ** 2 for rank, page in enumerate(first))
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
