"""The thread on which a population callback is told what VMs touch, and says what is to come next."""

import atexit
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from operator import index
from typing import SupportsIndex, cast

from latepage import _core
from latepage._callbacks import Told, called_for, summary
from latepage.errors import PagerError, PolicyError
from latepage.memory import format_size
from latepage.policy import Order
from latepage.session import Session
from latepage.stats import Reason, TraceEntry

__all__ = ["PopulationThread"]

MOST_RANGES = 65_536
"""Ranges that are taken from one call: a generator without an end would be waited for for ever."""


class PopulationThread:
    """Calls a population callback for the VMs of one socket, until their pager is closed."""

    def __init__(self, fn: Order) -> None:
        self._fn = fn
        self._name = f"population callback {getattr(fn, '__qualname__', None) or type(fn).__qualname__}"
        self.follower = _core.Follower()
        self._told = Told()
        self._outside: set[int] = set()
        self._thread = threading.Thread(target=self._work, name=f"latepage {self._name}", daemon=True)
        _threads.add(self)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around the call that has a pager listen: the thread is there from before it, and gone if it fails."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise PagerError(f"{self._name}: its thread cannot start: {error}", call="clone") from None
        try:
            yield
        except BaseException:
            self.follower.end()
            self._thread.join()
            raise

    def settle(self, seconds: float = 1.0) -> None:
        """After the pager was closed: waits for the thread, unless the callback holds it up for longer."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _work(self) -> None:
        with called_for(self._name):
            while (touched := self.follower.next()) is not None:
                native, entries = touched
                self._direct(native, [TraceEntry(page, cast("Reason", why), ns / 1e9) for page, why, ns in entries])

    def _direct(self, native: _core.Session, touched: list[TraceEntry]) -> None:
        try:
            named = self._fn(Session(native), touched)
            ranges = [] if named is None else [_checked(pair) for pair in islice(named, MOST_RANGES)]
        except BaseException as error:  # SystemExit too: other VMs need the thread
            self.follower.dismiss(native)
            if native.closed:
                return  # it asked a VM that had just gone: nobody is worse off
            text = f"{native.name}: {self._name}: nothing more is populated for this VM, its faults go on being served"
            self.follower.warn(f"{text}: {summary(error)}")
            self._told.error(text, error)
            return
        outside = self.follower.populate(native, ranges)
        if outside and native.id not in self._outside:
            self._outside.add(native.id)
            (offset, size), more = outside[0], len(outside) - 1
            end = max(region[3] + region[2] for region in native.regions())
            self.follower.warn(
                f"{native.name}: {self._name}: it named {size} bytes at offset {offset:#x}"
                + (f", and {more} more such ranges" if more else "")
                + f", which the VM's memory of {format_size(end)} does not have; they are left out (told once a VM)"
            )


_threads: weakref.WeakSet[PopulationThread] = weakref.WeakSet()


@atexit.register
def _retire() -> None:
    """No thread of ours wakes up in an interpreter that is going away."""
    for thread in list(_threads):
        thread.follower.end()
        thread.settle(0.2)


def _checked(pair: Iterable[SupportsIndex]) -> tuple[int, int]:
    try:
        offset, size = map(index, pair)
    except (TypeError, ValueError):
        offset = size = -1
    if 0 <= offset < 1 << 63 and 0 <= size < 1 << 63:
        return offset, size
    raise PolicyError(f"it named {pair!r}, and a range is a pair of offset and size in bytes")
