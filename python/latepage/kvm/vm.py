"""A VM in this process."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from latepage import _core
from latepage.errors import GuestError
from latepage.kvm.requests import Requests, result_of

__all__ = ["Backing", "ConfigError", "Delivery", "Guest", "Handshake", "Shards", "Trap", "Vm"]

Backing = Literal["shared", "private", "anonymous", "hugetlb"]
Guest = Literal["auto", "kvm", "threads"]
Handshake = Literal["firecracker", "latepage"]
Delivery = Literal["uffd", "exit", "notify"]
Trap = Literal["bitmap", "attributes"]
Shards = int | Literal["auto"]
MOST_SHARDS = 64
"""Userfaultfds of a VM: `latepage::memory::Shards::MOST`."""


class ConfigError(GuestError, ValueError):
    """No VM can be as it was asked for."""


class Vm(Requests):
    """A VM, its vCPUs threads of this process. Closing it ends it.

    No vCPU's thread ever runs Python. Where a pager brings the memory, a request that touches it may wait for the pager.
    """

    def __init__(self, core: _core.Vm, name: str | None) -> None:
        self._core = core
        self._name = name

    @classmethod
    def create(
        cls,
        name: str | None = None,
        *,
        memory: int,
        backing: Backing = "anonymous",
        vcpus: int = 1,
        split: bool = False,
        guest: Guest = "auto",
    ) -> Self:
        """A VM with zeroed memory, which runs and waits for jobs.

        Args:
            name: 1 to 64 of `A-Z a-z 0-9 . _ -`; by default `vm-PID`.
            memory: bytes, a multiple of 2 MiB.
            backing: what the memory is made of.
            vcpus: 1 to 64; of a guest of threads, to 1024.
            split: put the upper half at 4 GiB, however small the memory is.
            guest: `kvm`, `threads`, or whichever there is.

        Raises:
            ConfigError: if there can be no such VM.
            GuestError: if the machine lacks something, or a call fails.
        """
        config = {
            "name": default_name() if name is None else name,
            "memory": memory,
            "backing": backing,
            "vcpus": vcpus,
            "split": split,
            "guest": guest,
        }
        return cls.from_config(config)

    @classmethod
    def restore(
        cls,
        state_file: str | Path,
        *,
        memory_file: str | Path | None = None,
        map_memory: bool = False,
        late: bool = False,
        delivery: Delivery = "uffd",
        trap: Trap | None = None,
        window: int | None = None,
        pager: str | Path | None = None,
        notify_all: bool = False,
        handshake: Handshake = "latepage",
        send_memory: bool | None = None,
        shards: Shards | None = None,
        name: str | None = None,
        backing: Backing | None = None,
        guest: Guest = "auto",
        paused: bool = False,
    ) -> Self:
        """A VM that was saved. Unless it shall stay paused, it goes on with the job in whose middle it was.

        Args:
            state_file: the state file.
            memory_file: the memory file, if it is the VMM that brings the memory.
            map_memory: map the memory file and let the kernel bring pages when they are touched, instead of reading it in.
            late: have the VMM itself bring the memory file's pages when they are touched. The memory is shared memory.
            delivery: how accesses to absent pages reach whoever brings them: `uffd` (by userfaultfd), `exit` (late memory: the
                vCPU's own thread resolves a memory-fault exit), or `notify` (a pager's: it posts the exit to the pager).
            trap: what makes a vCPU's access an exit; None means the best that this kernel has.
            window: bytes that come with a touched page, a multiple of 4096, 65536 at most; None means the page alone.
            pager: a pager's socket, if it is a pager that brings the memory.
            notify_all: with the delivery `notify`, do not give the pager the userfaultfd: post what comes by it, too.
            handshake: the form in which the VM introduces itself.
            send_memory: whether the memfd of shared or private memory goes with latepage's handshake, so that the pager fills it
                through its own view; None means for shared memory.
            shards: how many userfaultfds the pager gets, each over a shard of the memory: 1 to 64, or `auto` for one for each 16
                vCPUs; None means one. Latepage's handshake only, but for one.
            name: by default `vm-PID`.
            backing: what the memory is made of; by default what it was.
            guest: `kvm`, `threads`, or whichever there is.
            paused: wait for `resume` before the first instruction.

        Raises:
            ConfigError: if the arguments contradict each other.
            GuestError: if a file is missing or not what it should be, or no pager is there.
        """
        memory: dict[str, Any]
        if (memory_file is None) == (pager is None):
            raise ConfigError("memory comes either from a memory file or from a pager: name one of the two")
        if late and (memory_file is None or map_memory):
            raise ConfigError("late memory comes from a memory file that is not mapped")
        if pager is None and not late and (delivery != "uffd" or trap is not None):
            raise ConfigError("delivery and trap go with late memory, or with a pager")
        if not late and window is not None:
            raise ConfigError("a window goes with late memory; a pager has a policy of its own")
        if notify_all and pager is None:
            raise ConfigError("notify_all takes a pager and the delivery notify")
        if pager is None and shards is not None:
            raise ConfigError("shards go with a pager")
        if memory_file is not None and late:
            memory = late_memory(memory_file, delivery, trap, window)
        elif memory_file is not None:
            memory = {"from": "map" if map_memory else "read", "memory_file": os.fspath(memory_file)}
        else:
            if map_memory:
                raise ConfigError("only a memory file can be mapped")
            memory = pager_memory(pager or "", handshake, send_memory, delivery, trap, notify_all=notify_all, shards=shards)
        config = {
            "name": default_name() if name is None else name,
            "state_file": os.fspath(state_file),
            "memory": memory,
            "backing": backing,
            "guest": guest,
            "paused": paused,
        }
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """A VM by its configuration as JSON: restored if it names a state file, else created."""
        make = _core.Vm.restore if "state_file" in config else _core.Vm.create
        try:
            return cls(make(json.dumps(config)), config.get("name"))
        except ValueError as error:
            raise ConfigError(str(error), vm=config.get("name")) from None

    def request(self, what: str, **fields: Any) -> Any:
        """Asks for `what` and returns the result as plain JSON."""
        return result_of(self._core.request(json.dumps({"do": what, **fields})), self._name)

    def next_event(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next event (docs/vm.md lists them), if one is there or comes within `timeout` seconds; None means for ever."""
        event = self._core.next_event(timeout)
        return None if event is None else json.loads(event)

    def fileno(self) -> int:
        """Readable while events wait."""
        return self._core.event_descriptor()

    def listen(self, path: str | Path) -> None:
        """Answers requests at an API socket until the VM is closed. A socket that nobody listens on any more is replaced.

        Raises:
            GuestError: if the path is too long, or a live socket, or a file that is no socket.
        """
        self._core.listen(os.fspath(path))

    def close(self) -> None:
        """Ends the VM. Whoever waits for it is told so."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def late_memory(memory_file: str | Path, delivery: Delivery, trap: Trap | None, window: int | None) -> dict[str, Any]:
    """Memory that the VMM itself brings, as a configuration has it."""
    fields = {"memory_file": os.fspath(memory_file), "delivery": delivery, "trap": trap, "window": window}
    return {"from": "late", **fields}


def pager_memory(
    socket: str | Path,
    handshake: Handshake,
    send_memory: bool | None,
    delivery: Delivery,
    trap: Trap | None,
    *,
    notify_all: bool,
    shards: Shards | None,
) -> dict[str, Any]:
    """Memory that a pager brings, as a configuration has it.

    Raises:
        ConfigError: if there is no such way to a pager.
    """
    if delivery == "exit":
        raise ConfigError(
            "with the delivery exit the VMM brings the pages itself: name a memory file as late memory; "
            "a pager takes uffd or notify"
        )
    if delivery == "uffd":
        if trap is not None or notify_all:
            raise ConfigError("a trap, and notify_all, go with the delivery notify")
        way = {"handshake": handshake, "send_memory": send_memory, "shards": shards}
        return {"from": "pager", "socket": os.fspath(socket), **way}
    if shards is not None:
        raise ConfigError("with the delivery notify vCPUs post to a channel: shards go with uffd")
    if handshake != "latepage":
        raise ConfigError("Firecracker's handshake carries no channel: the delivery notify takes latepage's")
    if send_memory is False:
        raise ConfigError("with the delivery notify the pager fills the memory file, so it is always sent")
    return {"from": "notify", "socket": os.fspath(socket), "trap": trap, "all": notify_all}


def parse_shards(text: str) -> Shards:
    """A number of shards, or `auto`, as a command line has it."""
    if text == "auto":
        return "auto"
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= MOST_SHARDS:
        raise ValueError(f"{text!r} is no number of shards: give 1 to {MOST_SHARDS}, or auto")
    return count


def default_name() -> str:
    """What a VM is called that was given no name."""
    return f"vm-{os.getpid()}"
