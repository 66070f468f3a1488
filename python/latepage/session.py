"""One VM that is being served."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from latepage import _core
from latepage._callbacks import refuse_in_callback
from latepage.memory import PageState, Region
from latepage.stats import Reason, Stats, TraceEntry, from_engine

__all__ = ["Progress", "Session"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of its memory a VM has.

    Attributes:
        total: pages of its memory.
        present: pages that the guest has.
        removed: pages that it discarded: they read as zero.
        failed: pages that could not be had.
        lacking: pages that are still to come.
    """

    total: int
    present: int
    removed: int
    failed: int
    lacking: int

    @property
    def full(self) -> bool:
        """Whether nothing is left to bring.

        >>> Progress(total=4, present=3, removed=1, failed=0, lacking=0).full
        True
        """
        return self.lacking == 0

    @property
    def share(self) -> float:
        """How much has come, from 0 to 1.

        >>> Progress(total=4, present=1, removed=0, failed=0, lacking=3).share
        0.25
        """
        return 1 - self.lacking / self.total


class Session:
    """A VM that is being served, or was. `Pager.sessions` and `Pager.session` give them.

    What it says is read from the engine at that moment. It can be asked after its VM has gone, too.
    """

    def __init__(self, native: _core.Session) -> None:
        self._native = native

    @property
    def name(self) -> str:
        """The VM's name: what its handshake said, else `pid-` and its process; made unique among a pager's sessions."""
        return self._native.name

    @property
    def pid(self) -> int:
        """The VMM's process."""
        return self._native.pid

    @property
    def form(self) -> str:
        """The handshake that it came with: `firecracker` or `latepage`."""
        return self._native.form

    @property
    def backing(self) -> str:
        """What its memory is made of: `anonymous`, `private`, `shared` or `hugetlb`."""
        return self._native.backing

    @property
    def vcpus(self) -> int:
        """How many vCPUs it says it has."""
        return self._native.vcpus

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return self._native.age

    @property
    def closed(self) -> bool:
        """Whether it is over: the VM has ended, or needs no pager any more."""
        return self._native.closed

    @property
    def regions(self) -> tuple[Region, ...]:
        """Where its memory lies."""
        return tuple(Region(*region) for region in self._native.regions())

    @property
    def progress(self) -> Progress:
        """How much of its memory it has."""
        count = self._native.progress()
        return Progress(
            total=sum(count),
            present=count[PageState.PRESENT] + count[PageState.FILLED],
            removed=count[PageState.REMOVED],
            failed=count[PageState.FAILED],
            lacking=count[PageState.ABSENT] + count[PageState.IN_FLIGHT] + count[PageState.CLEARING],
        )

    @property
    def stats(self) -> Stats:
        """Its counters, and how long its faults waited."""
        return from_engine(self._native.stats())

    def pages(self) -> bytes:
        """The state of every page, one byte each, as `PageState` numbers them."""
        return self._native.pages()

    def trace(self, cursor: int = 0) -> tuple[list[TraceEntry], int]:
        """The trace from `cursor` on, oldest first, and the cursor to go on with.

        The ring keeps the newest entries only: what was overwritten before it was read is missing.
        """
        entries, cursor, _ = self._native.trace(cursor)
        return [TraceEntry(page, cast("Reason", why), ns / 1e9, pages) for page, why, ns, pages in entries], cursor

    def populate(self, ranges: Iterable[tuple[int, int]] | None = None) -> None:
        """Asks for pages ahead of their faults, and returns at once; faults still go first.

        Args:
            ranges: pairs of offset and size in the snapshot, in bytes, brought in that order; None for all there is.

        Raises:
            SessionError: a range is not in the VM's memory, or the session is over.
        """
        self._native.populate(None if ranges is None else list(ranges))

    def wait_populated(self, timeout: float | None = None) -> bool:
        """Waits until the VM has all of its memory.

        Args:
            timeout: seconds to wait at most; None for as long as it takes.

        Returns:
            Whether it has.

        Raises:
            SessionError: the session ended before.
            PagerError: it was called by a callback of a source or a policy.
        """
        if timeout != 0:
            refuse_in_callback("Session.wait_populated")
        return self._native.wait_populated(timeout)

    def __repr__(self) -> str:
        return f"<latepage.Session {self.name!r}, pid {self.pid}, {'closed' if self.closed else 'open'}>"
