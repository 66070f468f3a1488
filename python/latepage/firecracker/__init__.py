"""Restoring VMs of an unchanged Firecracker, and a client of its API.

>>> from latepage.firecracker import Version
>>> Version.parse("1.16.1") >= Version(1, 12)
True
"""

from typing import TYPE_CHECKING, Any

from latepage.errors import FirecrackerError
from latepage.firecracker.calls import Call, HugePages, InstanceInfo, MemoryBackend
from latepage.firecracker.jailer import Jailer
from latepage.firecracker.options import Options
from latepage.firecracker.restoration import Restoration, RestoredVm, Step
from latepage.firecracker.restore import restore, restoring
from latepage.firecracker.state_file import StateFile
from latepage.firecracker.version import Version
from latepage.reach import Owner

if TYPE_CHECKING:
    from latepage.firecracker.client import AsyncClient, Client

__all__ = [
    "AsyncClient",
    "Call",
    "Client",
    "FirecrackerError",
    "HugePages",
    "InstanceInfo",
    "Jailer",
    "MemoryBackend",
    "Options",
    "Owner",
    "Restoration",
    "RestoredVm",
    "StateFile",
    "Step",
    "Version",
    "restore",
    "restoring",
]


def __getattr__(name: str) -> Any:
    # Importing httpx takes longer than starting Firecracker does: a restore imports it while Firecracker starts.
    if name in ("AsyncClient", "Client"):
        from latepage.firecracker import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
