"""What a user may choose for a restore: one frozen value."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latepage.errors import PolicyError
from latepage.firecracker.calls import HugePages
from latepage.firecracker.jailer import Jailer
from latepage.policy import Policy
from latepage.reach import Owner

if TYPE_CHECKING:
    from latepage.firecracker.restoration import Restoration, Step

__all__ = ["Options"]

Name = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How VMs are restored. Every field is an argument of `restore` and `restoring`.

    Attributes:
        firecracker: the program, on PATH or with its path.
        jailer: start it through Firecracker's jailer.
        owner: run Firecracker as this user (with a jailer, that is the jailer's); takes root.
        clones: how many VMs of the snapshot, restored all at once.
        api_sock: where a VM's API socket is to be; clones get a number before the suffix. In a private folder if None.
        socket: where the pager listens; in a private folder if None.
        pager_sock: a pager that listens already, in another process or in this one: then no pager is started.
        policy: how the pager treats the VMs.
        resume: run the VMs; False leaves them paused.
        network: for network interfaces, by id, the host's device in this place (Firecracker 1.12).
        vsock: path of the vsock device's socket in this place (Firecracker 1.16).
        clock_realtime: advance kvmclock by the time since the snapshot (Firecracker 1.16).
        huge_pages: what guest memory is made of, if not what it was (Firecracker 1.17).
        track_dirty_pages: so that differences can be saved later.
        arguments: more for Firecracker's command line, as `--level`, `--log-path`.
        console: a file that the VMs' standard output is appended to; the last 64 KiB of each are kept if None.
        timeout: seconds that each step may take.
        realtime: priority of the pager's workers in SCHED_FIFO, 1 to 99, where that is allowed.
        nice: their nice value, -20 to 19, where that is allowed.
        log: a descriptor to which the pager writes its events as lines of JSON.
        on_prepared: called when the pager listens and nothing has been started yet.
        on_step: called after each step, in the thread of the caller.
    """

    firecracker: Name = "firecracker"
    jailer: Jailer | None = None
    owner: Owner | None = None
    clones: int = 1
    api_sock: Name | None = None
    socket: Name | None = None
    pager_sock: Name | None = None
    policy: Policy | None = None
    resume: bool = True
    network: Mapping[str, str] | None = None
    vsock: Name | None = None
    clock_realtime: bool = False
    huge_pages: HugePages | None = None
    track_dirty_pages: bool = False
    arguments: tuple[str, ...] = ()
    console: Name | None = None
    timeout: float = 30.0
    realtime: int | None = None
    nice: int | None = None
    log: int | None = None
    on_prepared: Callable[["Restoration"], None] | None = None
    on_step: Callable[["Step"], None] | None = None

    def __post_init__(self) -> None:
        if self.clones < 1:
            raise PolicyError(f"clones is {self.clones}: give 1 or more")
        if not 0 < self.timeout <= 86_400:
            raise PolicyError(f"timeout is {self.timeout}: give seconds above zero")
        if self.jailer is not None and (self.api_sock is not None or self.socket is not None or self.pager_sock is not None):
            raise PolicyError("with a jailer the sockets are inside the jail: leave api_sock, socket and pager_sock out")
        if self.jailer is not None and self.owner is not None and self.owner != self.jailer.owner:
            raise PolicyError("with a jailer the owner is the jailer's: leave the other out")
        if self.pager_sock is not None and (self.socket is not None or self.policy is not None):
            raise PolicyError("with pager_sock no pager is started: leave socket and policy out")

    @property
    def runs_as(self) -> Owner | None:
        """As whom Firecracker runs, if not as ourselves."""
        if self.jailer is not None:
            return self.jailer.owner
        ours = Owner(os.geteuid(), os.getegid())
        # Only root can take its groups from somebody, itself among them.
        return None if self.owner == ours and ours.uid != 0 else self.owner
