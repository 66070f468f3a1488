"""The pager: listens for VMs, and serves them."""

import os
import select
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import TracebackType
from typing import Literal, NamedTuple, Self

from latepage import _core, stats
from latepage._callbacks import refuse_in_callback
from latepage._population import PopulationThread
from latepage.errors import PolicyError
from latepage.events import Event, from_engine
from latepage.policy import Policy
from latepage.session import Session
from latepage.source import Source
from latepage.stats import Stats

__all__ = ["Fallback", "Pager"]


class Fallback(NamedTuple):
    """Something that was asked for and cannot be had.

    Attributes:
        wish: `placement`, `realtime`, `nice` or `io_uring`.
        reason: why, what was done instead, and what it takes.
    """

    wish: str
    reason: str


class Pager:
    """Serves the page faults of any number of VMs, on threads of its own in which no Python runs.

    >>> import pathlib, tempfile
    >>> from latepage import open_source
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "guest.mem").write_bytes(bytes(1 << 20))
    >>> with Pager() as pager:
    ...     pager.listen(folder / "pager.sock", open_source(folder / "guest.mem"))
    ...     next(pager.events(timeout=5)).event
    'listening'

    Args:
        workers: threads that serve faults; by default one for each CPU, at most four.
        io_threads: threads that read what is not in memory yet.
        realtime: priority of the workers in the real-time class SCHED_FIFO, 1 to 99; where that is not allowed they stay
            ordinary threads, and `fallbacks` says so.
        nice: nice value of the workers, -20 (first) to 19; where that is not allowed they keep theirs, and `fallbacks` says so.
        log: a file descriptor, which is duplicated: the engine itself writes each event there as a line of JSON.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        io_threads: int | None = None,
        realtime: int | None = None,
        nice: int | None = None,
        log: int | None = None,
    ) -> None:
        if realtime is not None and not 1 <= realtime <= 99:
            raise PolicyError(f"realtime is {realtime}: give a priority from 1 to 99")
        if nice is not None and not -20 <= nice <= 19:
            raise PolicyError(f"nice is {nice}: give a value from -20 (first) to 19")
        self._native = _core.Pager(workers=workers, io_threads=io_threads, realtime=realtime, nice=nice, log=log)
        self._sockets: dict[str, Source] = {}
        self._orders: list[PopulationThread] = []
        self._settled = False
        self._takes_vms = True

    def listen(self, path: str | os.PathLike[str], source: Source, policy: Policy | None = None) -> None:
        """Takes VMs at a Unix socket: any number of them, each with its memory from `source`.

        A stale socket at that path is replaced. VMs are taken from when this returns.

        Args:
            path: where the socket is made.
            source: what the VMs' memory comes from.
            policy: how they are treated; the default `Policy()` where there is none.

        Raises:
            ListenError: someone listens there, a file is there, the path is too long, its folder is missing, or it cannot be
                given to the policy's owner.
            PagerError: it was called by a callback of a source or a policy.
        """
        refuse_in_callback("Pager.listen")
        chosen = policy or Policy()
        order = PopulationThread(chosen.populate) if callable(chosen.populate) else None
        with source._listened_with(), nullcontext() if order is None else order.starting():
            self._native.listen(os.fspath(path), source._native, chosen.as_dict(), None if order is None else order.follower)
        self._sockets[os.fspath(path)] = source
        if order is not None:
            self._orders.append(order)

    @property
    def sockets(self) -> dict[str, Source]:
        """Where it was told to listen, and what VMs get their memory from there."""
        return dict(self._sockets)

    @property
    def ready(self) -> bool:
        """Whether it takes VMs: it listens somewhere, and is neither draining nor closed."""
        return self._takes_vms and bool(self._sockets)

    @property
    def events_told(self) -> dict[str, int]:
        """How many events of each kind there have been, by their names in the log, whether anyone has read them or not."""
        return {kind.event: 0 for kind in Event.__subclasses__()} | self._native.events_told()

    def sessions(self) -> list[Session]:
        """The VMs that are being served now."""
        return [Session(native) for native in self._native.sessions()]

    def session(self, name: str) -> Session:
        """The VM of that name.

        Raises:
            KeyError: none of that name is served now.
        """
        for session in self.sessions():
            if session.name == name:
                return session
        raise KeyError(name)

    @property
    def workers(self) -> list[str]:
        """How each thread that serves faults waits now: `block`, `spin`, or `core`: asleep on a core that was chosen for it."""
        return self._native.workers()

    @property
    def cold_reads(self) -> Literal["io_uring", "threads"]:
        """What reads the pages that faults wait for and that are not in memory. Where it is `threads`, `fallbacks` says why."""
        return "io_uring" if self._native.reads_by_ring() else "threads"

    @property
    def fallbacks(self) -> list[Fallback]:
        """What was asked for and cannot be had on this host, each once. An event `warning` has told of it too."""
        return [Fallback(wish, reason) for wish, reason in self._native.fallbacks()]

    @property
    def stats(self) -> Stats:
        """What all VMs did together, those that have ended among them: no figure of it ever goes back."""
        return stats.from_engine(self._native.stats())

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """What happens, in order, each event once.

        Args:
            timeout: seconds after which the iterator ends; 0 takes what is there, None waits for ever.
        """
        if timeout != 0:
            refuse_in_callback("Pager.events with a timeout")
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        while True:
            # One by one: whoever stops in the middle finds the rest the next time.
            while raw := self._native.take_events(1):
                yield from_engine(raw[0])
            remaining = None if deadline is None else deadline - time.monotonic()
            if not poll.poll(None if remaining is None else max(0, remaining) * 1000) and remaining is not None:
                return

    def fileno(self) -> int:
        """A descriptor that is readable while events wait, for select, poll or an event loop."""
        return self._native.event_descriptor()

    def drain(self) -> None:
        """Begins to finish: no new VM is taken, those that live get all that they lack and are then let go.

        Returns at once. The event `Drained` tells when every VM has ended or needs no pager any more.
        """
        self._takes_vms = False
        self._native.drain()

    def close(self) -> list[str]:
        """Ends all sessions. VMs that still lack memory are treated as their policy's `on_missing` says.

        Returns:
            The names of those VMs, and of those that have all their memory but cannot be let go: their next discard waits for
            ever. The event `Left` tells of each.
        """
        refuse_in_callback("Pager.close")
        self._takes_vms = False
        left = self._native.close()
        if not self._settled:
            # What its callbacks ran on has nothing to do any more.
            self._settled = True
            for source in {id(source): source for source in self._sockets.values()}.values():
                source._settle()
            for order in self._orders:
                order.settle()
        return left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
