"""The calls of Firecracker's API that a restore and its tests need, as plain values; `client` sends them.

Firecracker's own description is `src/firecracker/swagger/firecracker.yaml`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latepage.errors import PolicyError
from latepage.firecracker.version import Version

__all__ = ["Call", "HugePages", "InstanceInfo", "MemoryBackend"]

Name = str | os.PathLike[str]

HugePages = Literal["None", "Transparent", "2M"]
"""What guest memory is made of."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request.

    Attributes:
        method: GET, PUT or PATCH.
        path: which resource.
        body: what is sent as JSON; nothing where it is empty.
    """

    method: str
    path: str
    body: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """What Firecracker says of itself and its VM.

    Attributes:
        id: the VM's id (`--id`).
        state: `Not started`, `Running` or `Paused`.
        version: the Firecracker.
    """

    id: str
    state: str
    version: Version


@dataclass(frozen=True, slots=True)
class MemoryBackend:
    """Where a restored VM's memory comes from.

    Attributes:
        kind: `Uffd`, a pager that listens at `path`, or `File`, a memory file that Firecracker maps itself.
        path: the socket or the file, as Firecracker sees it.
    """

    kind: Literal["Uffd", "File"]
    path: str


def version() -> Call:
    return Call("GET", "/version", {})


def info() -> Call:
    return Call("GET", "/", {})


def load(
    state: Name,
    memory: MemoryBackend,
    *,
    resume: bool = False,
    track_dirty_pages: bool = False,
    network: Mapping[str, str] | None = None,
    vsock: Name | None = None,
    clock_realtime: bool = False,
    huge_pages: HugePages | None = None,
) -> Call:
    body: dict[str, Any] = {
        "snapshot_path": os.fspath(state),
        "mem_backend": {"backend_type": memory.kind, "backend_path": memory.path},
    }
    # What is at its default is not named, so that a Firecracker that does not know the field takes the call.
    if resume:
        body["resume_vm"] = True
    if track_dirty_pages:
        body["track_dirty_pages"] = True
    if network:
        body["network_overrides"] = [{"iface_id": name, "host_dev_name": device} for name, device in network.items()]
    if vsock is not None:
        body["vsock_override"] = {"uds_path": os.fspath(vsock)}
    if clock_realtime:
        body["clock_realtime"] = True
    if huge_pages is not None:
        body["huge_pages"] = huge_pages
    return Call("PUT", "/snapshot/load", body)


def create(state: Name, memory: Name, *, diff: bool = False) -> Call:
    body = {"snapshot_type": "Diff" if diff else "Full", "snapshot_path": os.fspath(state), "mem_file_path": os.fspath(memory)}
    return Call("PUT", "/snapshot/create", body)


def vm_state(state: Literal["Paused", "Resumed"]) -> Call:
    return Call("PATCH", "/vm", {"state": state})


def _mib(size: int, what: str) -> int:
    if size % (1 << 20):
        raise PolicyError(f"{what} is {size}: give bytes, in whole MiB")
    return size >> 20


def machine(
    *, vcpus: int, memory: int, huge_pages: HugePages | None = None, track_dirty_pages: bool = False, smt: bool = False
) -> Call:
    body: dict[str, Any] = {"vcpu_count": vcpus, "mem_size_mib": _mib(memory, "memory")}
    if huge_pages is not None:
        body["huge_pages"] = huge_pages
    if track_dirty_pages:
        body["track_dirty_pages"] = True
    if smt:
        body["smt"] = True
    return Call("PUT", "/machine-config", body)


def boot_source(kernel: Name, arguments: str | None = None, initrd: Name | None = None) -> Call:
    body = {"kernel_image_path": str(Path(kernel))}
    if arguments is not None:
        body["boot_args"] = arguments
    if initrd is not None:
        body["initrd_path"] = os.fspath(initrd)
    return Call("PUT", "/boot-source", body)


def action(kind: Literal["InstanceStart", "SendCtrlAltDel", "FlushMetrics"]) -> Call:
    return Call("PUT", "/actions", {"action_type": kind})


def balloon(
    amount: int, *, deflate_on_oom: bool = True, free_page_reporting: bool = False, free_page_hinting: bool = False
) -> Call:
    body: dict[str, Any] = {"amount_mib": _mib(amount, "amount"), "deflate_on_oom": deflate_on_oom}
    if free_page_reporting:
        body["free_page_reporting"] = True
    if free_page_hinting:
        body["free_page_hinting"] = True
    return Call("PUT", "/balloon", body)


def set_balloon(amount: int) -> Call:
    return Call("PATCH", "/balloon", {"amount_mib": _mib(amount, "amount")})
