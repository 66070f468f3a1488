"""Firecracker's API over its Unix socket: a client that waits, and one for asyncio.

Both have the same methods, each one call of `calls`. What a version of Firecracker does not understand is refused
before it is sent, with the version that does.
"""

import os
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from latepage.errors import FirecrackerError
from latepage.firecracker import calls
from latepage.firecracker.calls import Call, HugePages, InstanceInfo, MemoryBackend, Name
from latepage.firecracker.version import Version, gated, require

__all__ = ["AsyncClient", "Client"]

_TIMEOUT = 30.0
_NO_TLS = False
"""There is no TLS on a Unix socket, and reading the system's certificates for it takes longer than a restore."""


class _Api:
    """What both clients share: how a call is written, and how its answer is read."""

    def __init__(self, path: Name, *, timeout: float | None = _TIMEOUT) -> None:
        """A client for the API socket at `path`; it connects with the first call.

        Args:
            path: the socket (Firecracker's `--api-sock`), as this process sees it.
            timeout: seconds that an answer may take; None for as long as it takes.
        """
        self.path = os.fspath(path)
        self._timeout = httpx.Timeout(timeout)
        self._version: Version | None = None

    def _request(self, call: Call) -> dict[str, Any]:
        return {"method": call.method, "url": f"http://firecracker{call.path}", "json": dict(call.body) or None}

    def _gone(self, call: Call, error: httpx.HTTPError | OSError) -> FirecrackerError:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno is not None):
            cause = cause.__cause__ or cause.__context__
        errno = cause.errno if isinstance(cause, OSError) else None
        if isinstance(error, httpx.ConnectError | OSError):
            why = os.strerror(errno) if errno is not None else str(error)
            return FirecrackerError(
                f"API socket {self.path}: {why}; does a Firecracker with --api-sock {self.path} run?", call="connect", errno=errno
            )
        if isinstance(error, httpx.TimeoutException):
            return FirecrackerError(f"API socket {self.path}: no answer to {call} in time", call=str(call))
        why = str(error) or type(error).__name__
        return FirecrackerError(f"API socket {self.path}: no answer to {call}: {why}", call=str(call), errno=errno)

    def _answer(self, call: Call, response: httpx.Response) -> Any:
        try:
            said = response.json() if response.content else None
        except ValueError:
            said = None
        if response.is_success:
            return said
        fault = said.get("fault_message") if isinstance(said, dict) else None
        words = fault if isinstance(fault, str) else response.text
        raise FirecrackerError(
            f"Firecracker refused {call} ({response.status_code})\n  Firecracker: {words}",
            status=response.status_code,
            fault_message=words,
            call=str(call),
        )

    @staticmethod
    def _version_of(said: Any, key: str) -> Version:
        found = said.get(key) if isinstance(said, dict) else None
        if not isinstance(found, str):
            raise FirecrackerError("what answers at the API socket does not say its version: is it Firecracker?")
        return Version.parse(found)

    def _info_of(self, said: Any) -> InstanceInfo:
        version = self._version_of(said, "vmm_version")
        return InstanceInfo(str(said.get("id", "")), str(said.get("state", "")), version)

    @staticmethod
    def _too_old_to_say(error: FirecrackerError) -> bool:
        # GET /version is there since 1.0; before, only GET / told the version.
        return error.status in (400, 404)


class Client(_Api):
    """Firecracker's API, one call at a time. It may be used by one thread at a time.

    Every method raises FirecrackerError: what Firecracker said, that it is too old for the call, or that it is gone.
    """

    def __init__(self, path: Name, *, timeout: float | None = _TIMEOUT) -> None:
        super().__init__(path, timeout=timeout)
        self._reached = False
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=self.path, verify=_NO_TLS), timeout=self._timeout, trust_env=False
        )

    def call(self, call: Call) -> Any:
        """Makes any call, and returns its answer as plain JSON; None where there is no body."""
        if gated(str(call), call.body):
            require(self.version(), str(call), call.body)
        return self._send(call)

    def _send(self, call: Call) -> Any:
        try:
            if not self._reached:
                # httpcore forgets its socket where nobody listens; this one is closed.
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(self.path)
                self._reached = True
            response = self._http.request(**self._request(call))
        except (httpx.HTTPError, OSError) as error:
            raise self._gone(call, error) from None
        return self._answer(call, response)

    def version(self) -> Version:
        """Which Firecracker this is; asked once."""
        if self._version is None:
            try:
                self._version = self._version_of(self._send(calls.version()), "firecracker_version")
            except FirecrackerError as error:
                if not self._too_old_to_say(error):
                    raise
                self._version = self.info().version
        return self._version

    def info(self) -> InstanceInfo:
        """The VM's id and state, and the version."""
        return self._info_of(self._send(calls.info()))

    def load_snapshot(
        self,
        state: Name,
        memory: MemoryBackend,
        *,
        resume: bool = False,
        track_dirty_pages: bool = False,
        network: Mapping[str, str] | None = None,
        vsock: Name | None = None,
        clock_realtime: bool = False,
        huge_pages: HugePages | None = None,
    ) -> None:
        """Loads a snapshot into a Firecracker that was only just started. If this fails, Firecracker ends.

        Guest memory is touched before this returns, so the pager must listen and serve by then.

        Args:
            state: the state file, as Firecracker sees it.
            memory: the pager's socket, or the memory file.
            resume: run the VM at once.
            track_dirty_pages: so that differences can be saved later.
            network: for network interfaces, by id, the host's device (since 1.12).
            vsock: path of the vsock device's socket (since 1.16).
            clock_realtime: advance kvmclock by the time since the snapshot (since 1.16).
            huge_pages: what guest memory is made of, if not what it was (since 1.17).
        """
        options: dict[str, Any] = {"network": network, "vsock": vsock, "clock_realtime": clock_realtime, "huge_pages": huge_pages}
        self.call(calls.load(state, memory, resume=resume, track_dirty_pages=track_dirty_pages, **options))

    def create_snapshot(self, state: Name, memory: Name, *, diff: bool = False) -> None:
        """Writes a snapshot of the VM, which must be paused. A full one reads all of the guest's memory."""
        self.call(calls.create(state, memory, diff=diff))

    def pause(self) -> None:
        """Stops the vCPUs."""
        self.call(calls.vm_state("Paused"))

    def resume(self) -> None:
        """Lets the vCPUs run."""
        self.call(calls.vm_state("Resumed"))

    def machine(
        self,
        *,
        vcpus: int,
        memory: int,
        huge_pages: HugePages | None = None,
        track_dirty_pages: bool = False,
        smt: bool = False,
    ) -> None:
        """Says how large the VM is, before it starts: `memory` in bytes, in whole MiB."""
        self.call(calls.machine(vcpus=vcpus, memory=memory, huge_pages=huge_pages, track_dirty_pages=track_dirty_pages, smt=smt))

    def boot_source(self, kernel: Name, arguments: str | None = None, initrd: Name | None = None) -> None:
        """Says what the VM boots."""
        self.call(calls.boot_source(kernel, arguments, initrd))

    def balloon(
        self, amount: int = 0, *, deflate_on_oom: bool = True, free_page_reporting: bool = False, free_page_hinting: bool = False
    ) -> None:
        """Gives the VM a balloon of so many bytes, before it starts."""
        options = {"free_page_reporting": free_page_reporting, "free_page_hinting": free_page_hinting}
        self.call(calls.balloon(amount, deflate_on_oom=deflate_on_oom, **options))

    def set_balloon(self, amount: int) -> None:
        """Asks the guest to give up so many bytes to the balloon, in whole MiB."""
        self.call(calls.set_balloon(amount))

    def start(self) -> None:
        """Boots the VM."""
        self.call(calls.action("InstanceStart"))

    def close(self) -> None:
        """Closes the connection; Firecracker goes on."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class AsyncClient(_Api):
    """The same for asyncio; what each method does stands at `Client`'s."""

    def __init__(self, path: Name, *, timeout: float | None = _TIMEOUT) -> None:
        super().__init__(path, timeout=timeout)
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=self.path, verify=_NO_TLS), timeout=self._timeout, trust_env=False
        )

    async def call(self, call: Call) -> Any:
        """Makes any call, and returns its answer as plain JSON; None where there is no body."""
        if gated(str(call), call.body):
            require(await self.version(), str(call), call.body)
        return await self._send(call)

    async def _send(self, call: Call) -> Any:
        try:
            response = await self._http.request(**self._request(call))
        except (httpx.HTTPError, OSError) as error:
            raise self._gone(call, error) from None
        return self._answer(call, response)

    async def version(self) -> Version:
        """Which Firecracker this is; asked once."""
        if self._version is None:
            try:
                self._version = self._version_of(await self._send(calls.version()), "firecracker_version")
            except FirecrackerError as error:
                if not self._too_old_to_say(error):
                    raise
                self._version = (await self.info()).version
        return self._version

    async def info(self) -> InstanceInfo:
        """The VM's id and state, and the version."""
        return self._info_of(await self._send(calls.info()))

    async def load_snapshot(
        self,
        state: Name,
        memory: MemoryBackend,
        *,
        resume: bool = False,
        track_dirty_pages: bool = False,
        network: Mapping[str, str] | None = None,
        vsock: Name | None = None,
        clock_realtime: bool = False,
        huge_pages: HugePages | None = None,
    ) -> None:
        """Loads a snapshot into a Firecracker that was only just started."""
        options: dict[str, Any] = {"network": network, "vsock": vsock, "clock_realtime": clock_realtime, "huge_pages": huge_pages}
        await self.call(calls.load(state, memory, resume=resume, track_dirty_pages=track_dirty_pages, **options))

    async def create_snapshot(self, state: Name, memory: Name, *, diff: bool = False) -> None:
        """Writes a snapshot of the VM, which must be paused."""
        await self.call(calls.create(state, memory, diff=diff))

    async def pause(self) -> None:
        """Stops the vCPUs."""
        await self.call(calls.vm_state("Paused"))

    async def resume(self) -> None:
        """Lets the vCPUs run."""
        await self.call(calls.vm_state("Resumed"))

    async def set_balloon(self, amount: int) -> None:
        """Asks the guest to give up so many bytes to the balloon, in whole MiB."""
        await self.call(calls.set_balloon(amount))

    async def close(self) -> None:
        """Closes the connection; Firecracker goes on."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
