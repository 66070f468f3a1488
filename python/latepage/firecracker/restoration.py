"""VMs that were restored: what one may do with them, and how they and their pager end."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from latepage.errors import FirecrackerError
from latepage.events import Drained
from latepage.firecracker.jailer import Jail
from latepage.firecracker.output import OutputReader
from latepage.firecracker.place import Folder, Place
from latepage.firecracker.process import VmmProcess
from latepage.firecracker.version import Version
from latepage.pager import Pager
from latepage.policy import OnMissing
from latepage.session import Session

if TYPE_CHECKING:
    from latepage.firecracker.client import AsyncClient, Client

__all__ = ["Restoration", "RestoredVm", "Step"]


_JAILER_TAKES = 5.0
"""Seconds within which a jailer has ended, once it has started Firecracker in a new pid namespace."""
_DEATH_TAKES = 5.0
"""Seconds within which a VM that was killed has ended."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a restore that is done.

    Attributes:
        step: `prepare` (the files are looked at and the pager listens), `start` (Firecracker answers at its API socket),
            `load` (its snapshot is loaded) or `resume` (its vCPUs run).
        clone: of which VM, from 1; 0 for what is done once for all.
        pid: its process, once there is one.
        seconds: how long it took.
        at: when it was done, in seconds since 1970.
        what: what there is to say of it, for people.
    """

    step: str
    clone: int
    pid: int | None
    seconds: float
    at: float
    what: str

    def as_dict(self) -> dict[str, Any]:
        """As a line of JSON has it."""
        return {
            "event": "step",
            "at": self.at,
            "step": self.step,
            "clone": self.clone,
            "pid": self.pid,
            "seconds": self.seconds,
            "what": self.what,
        }


@dataclass
class RestoredVm:
    """One VM of a restoration.

    Attributes:
        clone: which one, from 1.
        process: its Firecracker: pid, status, console, standard error.
        version: of that Firecracker.
        place: where its sockets are.
        begun: when it was started, on the monotonic clock.
        steps: how long each step took, in seconds.
        lives_on: whether it was let go, and lives without us.
    """

    clone: int
    process: VmmProcess
    version: Version
    place: Place
    begun: float
    steps: dict[str, float] = field(default_factory=dict)
    lives_on: bool = False
    _jail: Jail | None = None

    @property
    def pid(self) -> int:
        """Its Firecracker's process."""
        return self.process.pid

    @property
    def api_sock(self) -> Path:
        """Its API socket, as this process sees it."""
        return self.place.api_sock

    @property
    def jail(self) -> Path | None:
        """What Firecracker sees as `/`, where it is jailed."""
        return None if self._jail is None else self._jail.root

    def client(self) -> "Client":
        """A new client of its API."""
        from latepage.firecracker.client import Client

        return Client(self.api_sock)

    def async_client(self) -> "AsyncClient":
        """A new client of its API, for asyncio."""
        from latepage.firecracker.client import AsyncClient

        return AsyncClient(self.api_sock)

    def end(self) -> None:
        """Kills it, if it lives, and removes its sockets."""
        if self._jail is not None and self._jail.will_hand_over and self.process.is_child:
            # The jailer has started Firecracker, or is about to, and would leave it behind.
            self.process.wait(_JAILER_TAKES)
            pid = self._jail.pid()
            if pid is not None:
                with contextlib.suppress(FirecrackerError):
                    self.process.become(pid)
        self.process.kill()
        self._forget()

    def leave(self) -> None:
        """Lets it go on without us, with its API socket and its jail; of one that has ended, those are removed."""
        self.lives_on = self.process.alive
        self.process.leave()
        if not self.lives_on:
            self._forget()

    def _forget(self) -> None:
        if self._jail is not None:
            # Its owner may have put a link in the way to any file in it: the jail knows how to remove them.
            self._jail.remove()
            return
        for path in (self.place.api_sock, *self.place.made):
            path.unlink(missing_ok=True)


class Restoration:
    """VMs of one snapshot, and the pager that serves them, if it is ours.

    As a context manager it ends its VMs, unless they were let go by `leave`.

    Attributes:
        vms: the VMs.
        pager: the pager that serves them; None where they are served by another process.
        steps: what was done, in the order in which it was done.
        seconds: from the call to the moment when the last VM ran.
    """

    def __init__(
        self,
        pager: Pager | None,
        folder: Folder,
        reader: OutputReader,
        *,
        console: int | None = None,
        jails: Sequence[Jail] = (),
        on_missing: OnMissing = "kill",
    ) -> None:
        self.vms: tuple[RestoredVm, ...] = ()
        self.pager = pager
        self.steps: list[Step] = []
        self.seconds = 0.0
        self._folder = folder
        self._reader = reader
        self._console = console
        self._jails = jails
        self._on_missing = on_missing
        self._closed = False

    @property
    def vm(self) -> RestoredVm:
        """The VM, where there is one only.

        Raises:
            FirecrackerError: there are several.
        """
        if len(self.vms) != 1:
            raise FirecrackerError(f"this restoration has {len(self.vms)} VMs: ask for one of .vms")
        return self.vms[0]

    def session(self, vm: RestoredVm) -> Session | None:
        """What the pager knows of a VM; None once it is over, or where the pager is another process."""
        sessions = [] if self.pager is None else self.pager.sessions()
        return next((session for session in sessions if session.pid == vm.pid), None)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until every VM has ended; whether they have.

        Args:
            timeout: seconds to wait at most; None for as long as it takes.
        """
        left = _time_left(timeout)
        return all(vm.process.wait(left()) for vm in self.vms)

    def leave(self, timeout: float | None = None) -> list[str]:
        """Lets the VMs go on without us: they get all that they still lack, and then nobody needs this pager.

        Their API sockets and jails stay. The restoration is over then.

        Args:
            timeout: seconds that this may take; None for as long as it takes.

        Returns:
            Names of VMs that did not get all of it in time: they were treated as the policy's `on_missing` says.
        """
        if self.pager is not None and not self._closed:
            self.pager.drain()
            for event in self.pager.events(timeout):
                if isinstance(event, Drained):
                    break
        return self.release()

    def release(self) -> list[str]:
        """Lets go of the VMs and of the pager at once: `leave` without waiting for what the VMs still lack.

        Returns:
            Names of VMs that lacked memory: they were treated as the policy's `on_missing` says.
        """
        left = [] if self.pager is None or self._closed else self.pager.close()
        self.wait_for_killed(left)
        self._finish(RestoredVm.leave)
        return left

    def wait_for_killed(self, left: Sequence[str]) -> None:
        """Waits until those have ended that a pager which was closed has killed: so much memory takes a moment to go.

        Args:
            left: what `Pager.close` returned.
        """
        if self._on_missing == "kill":
            for vm in self.vms:
                if f"vm-{vm.pid}" in left:
                    vm.process.wait(_DEATH_TAKES)

    def close(self) -> None:
        """Ends the VMs and the pager, and removes their sockets and jails."""
        self._finish(RestoredVm.end)

    def _finish(self, each: Callable[[RestoredVm], None]) -> None:
        if self._closed:
            return
        self._closed = True
        # Last first: the VMs before their pager, and what they had in their folders after both.
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove_folders)
            stack.callback(self._reader.close)
            if self._console is not None:
                stack.callback(os.close, self._console)
            if self.pager is not None:
                stack.callback(self.pager.close)
            for vm in self.vms:
                stack.callback(each, vm)

    def _remove_folders(self) -> None:
        if any(vm.lives_on for vm in self.vms):
            # Its API socket is there.
            self._folder.remove_if_empty()
            return
        for jail in self._jails:
            jail.remove()
        self._folder.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _time_left(seconds: float | None) -> Callable[[], float | None]:
    end = None if seconds is None else time.monotonic() + seconds
    return lambda: None if end is None else max(0.0, end - time.monotonic())
