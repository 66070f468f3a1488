"""The best way to fill a VM by userfaultfd in C, by trying what one would try: around a fault, ahead of it, where, how."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from latepage.bench.machine import cores
from latepage.memory import format_size

__all__ = ["Filler", "best_filler"]

KIB, MIB = 1 << 10, 1 << 20

FINALISTS, AGAIN = 3, 3
"""How many are run so many times more, so that no single run decides, lucky or not."""


@dataclass(frozen=True, slots=True)
class Filler:
    """How limit/filler.c goes about it.

    Attributes:
        around: bytes that are copied around a fault.
        chunk: bytes of each copy of a second thread that brings everything in order; 0 for none.
        same_core: whether the thread that serves the guest is pinned to the core that the guest is pinned to; else the
            scheduler decides.
        words: other options of the program.
    """

    around: int
    chunk: int = 0
    same_core: bool = False
    words: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """The program's."""
        pinned = () if self.core is None else (f"cpu={self.core}",)
        return (f"around={self.around}", f"chunk={self.chunk}", *pinned, *self.words)

    @property
    def core(self) -> int | None:
        """Where both are pinned, if they are."""
        return cores()[-1] if self.same_core else None

    def __str__(self) -> str:
        parts = [
            f"{format_size(self.around)} around a fault",
            f"all the rest by {format_size(self.chunk)}" if self.chunk else "",
            "on the guest's core" if self.same_core else "",
            *self.words,
        ]
        return ", ".join(part for part in parts if part)


def candidates(*, random: bool, cold: bool, pinned: bool) -> list[Filler]:
    """What is worth a try: small pieces for what is touched at random, larger ones for what is touched in sequence.

    Others were tried where this was written, and came nowhere near: read(2) into a buffer, two threads past the page cache.
    """
    if cold:
        found = (
            [Filler(4 * KIB), Filler(64 * KIB)]
            if random
            else [Filler(around, words=("ahead",)) for around in (64 * KIB, 512 * KIB)]
        )
        ahead: tuple[tuple[str, ...], ...] = ((), ("ahead",), ("direct", "threads=4"))
        return found + [Filler(64 * KIB, chunk, words=words) for chunk in (512 * KIB, 2 * MIB) for words in ahead]
    mapped = ("populate",)
    arounds = (4 * KIB, 16 * KIB, 64 * KIB) if random else (64 * KIB, 512 * KIB, 2 * MIB)
    places = (True, False) if pinned else (False,)
    found = [Filler(around, same_core=same, words=mapped) for around in arounds for same in places]
    found += [Filler(64 * KIB, chunk, words=mapped) for chunk in (512 * KIB, 4 * MIB)]
    return [*found, *(Filler(64 * KIB, 512 * KIB, same_core=True, words=mapped) for same in places if same)]


def best_filler(
    run: Callable[[Filler], float],
    *,
    random: bool,
    cold: bool,
    pinned: bool,
    few: bool,
    tell: Callable[[float, str], None],
) -> Filler:
    """The one that takes least time.

    Args:
        run: restores once, and says how long it took.
        random: whether the guest touches at random.
        cold: whether the file is on the disk.
        pinned: whether the guest is pinned to a core, which the thread that serves it may then share.
        few: try two only.
        tell: is told how far the search is.
    """
    tried = candidates(random=random, cold=cold, pinned=pinned)[: 2 if few else None]
    took: dict[Filler, list[float]] = {filler: [] for filler in tried}
    steps = 2 * len(tried) + AGAIN * FINALISTS
    done = 0

    def try_all(fillers: list[Filler]) -> None:
        nonlocal done
        for filler in fillers:
            tell(done / steps, f"look for the best C: {filler}")
            took[filler].append(run(filler))
            done += 1

    try_all(tried)
    try_all(tried)
    finalists = sorted(tried, key=lambda filler: min(took[filler]))[:FINALISTS]
    for _ in range(AGAIN):
        try_all(finalists)
    return min(finalists, key=lambda filler: median(took[filler]))
