"""Rates that others have published: what a model of many vCPUs on many cores can be checked against here.

Both are of demand paging tests of the kernel's own: pages of 4 KiB, no work between faults. Figures are thousand pages a second
in all; the series of KVM Userfault gives them for each vCPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SERIES", "Series"]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a table.

    Attributes:
        name: which, and of whom.
        delivery: `uffd`, `sharded` or `exit`.
        cores: of the host.
        rates: thousand pages a second in all, by vCPUs.
    """

    name: str
    delivery: str
    cores: int
    rates: Mapping[int, float]


def _each(**rates: float) -> Mapping[int, float]:
    return {int(count[1:]): int(count[1:]) * rate for count, rate in rates.items()}


SERIES = (
    Series("48 cores, one userfaultfd", "uffd", 48, _each(v2=98, v8=37, v64=1.7)),
    Series("48 cores, many userfaultfds", "sharded", 48, _each(v2=103, v8=57, v64=11)),
    Series("48 cores, KVM Userfault", "exit", 48, _each(v2=162, v8=114, v64=34)),
    Series(
        "256 cores, one userfaultfd", "uffd", 256, {1: 150, 2: 191, 4: 210, 8: 155, 16: 130, 32: 108, 64: 86, 128: 62, 256: 36}
    ),
    Series(
        "256 cores, memory-fault exits",
        "exit",
        256,
        {1: 340, 2: 477, 4: 809, 8: 1239, 16: 1595, 32: 2299, 64: 3482, 128: 4134, 256: 4012},
    ),
)
