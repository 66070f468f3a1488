"""The kernel itself: its version and its processor."""

import os
import re
from collections.abc import Iterator

from latepage.check.items import Item, known

__all__ = ["OLDEST", "at_least", "kernel_items", "too_old"]

OLDEST = (6, 1)
"""The first Linux that latepage is made for: it brought /dev/userfaultfd."""


def at_least(major: int, minor: int) -> bool:
    """Whether the running kernel calls itself that version or a later one.

    >>> at_least(2, 6), at_least(99, 0)
    (True, False)
    """
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is None or (int(found[1]), int(found[2])) >= (major, minor)


def too_old() -> str | None:
    """What is to be said of a kernel that is older than latepage is made for; None for the others."""
    wanted = ".".join(map(str, OLDEST))
    return None if at_least(*OLDEST) else f"this is Linux {os.uname().release}, and latepage needs {wanted} or later"


def kernel_items() -> Iterator[Item]:
    """The subject `kernel`."""
    machine = os.uname()
    yield Item(
        key="kernel.version",
        name="Linux",
        state=known(at_least(*OLDEST)),
        found=machine.release,
        need="serve",
        value=machine.release,
        todo=too_old(),
    )
    right = machine.machine == "x86_64"
    yield Item(
        key="kernel.processor",
        name="processor",
        state=known(right),
        found=machine.machine,
        need="serve",
        value=machine.machine,
        todo=None if right else "use x86_64: latepage runs on nothing else yet",
    )
