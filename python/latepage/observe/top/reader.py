"""Asks a pager's status server how its VMs are."""

import asyncio
import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import quote

import httpx

from latepage.errors import LatepageError
from latepage.observe.address import Address, UnixAddress
from latepage.observe.top.figures import Look, VmLook
from latepage.observe.vms import VERSION

__all__ = ["HttpReader", "Reader", "VmGoneError"]

PATIENCE = 5.0
"""Seconds that a pager has for an answer, from the question to its last byte."""
MOST_BYTES = 64 << 20
"""Bytes of an answer, at most: those of some 50,000 VMs. What goes on after that is no pager's."""


T = TypeVar("T")


class VmGoneError(LatepageError):
    """The pager serves no VM of that name now."""


class Reader(Protocol):
    """What `top` asks for; the tests' own answers as they like."""

    async def all_vms(self) -> Look:
        """The pager and its VMs."""

    async def one_vm(self, name: str, cells: int) -> VmLook:
        """One VM, its memory in so many cells."""


class HttpReader:
    """Asks over TCP or a Unix socket.

    Raises:
        LatepageError: on asking: nobody answers there, what answers is no pager's status server, or another version's.
        VmGoneError: on asking for a VM that is not served.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        path = address.path if isinstance(address, UnixAddress) else None
        # A proxy that the environment names is for the web, not for a pager of ours.
        self._client = httpx.AsyncClient(
            base_url=address.url,
            transport=httpx.AsyncHTTPTransport(uds=path),
            timeout=PATIENCE,
            trust_env=False,
            # What is packed could be of any size.
            headers={"Accept-Encoding": "identity"},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def all_vms(self) -> Look:
        """The pager and its VMs."""
        return self._understood(Look.from_json, await self.document())

    async def one_vm(self, name: str, cells: int) -> VmLook:
        """One VM, its memory in so many cells."""
        answer = await self._get(f"/vms/{quote(name, safe='')}?cells={cells}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise VmGoneError(f"{name}: not served any more", vm=name)
        return self._understood(VmLook.from_json, self._document(answer))

    async def document(self) -> dict[str, Any]:
        """What /vms answers, as it is."""
        return self._document(await self._get("/vms"))

    async def _get(self, path: str) -> httpx.Response:
        try:
            # The client's own limit is for each read: an answer that dribbles would never end.
            async with asyncio.timeout(PATIENCE), self._client.stream("GET", path) as answer:
                content = bytearray()
                async for part in answer.aiter_raw():
                    content += part
                    if len(content) > MOST_BYTES:
                        raise LatepageError(f"{self._address}: the answer goes on after {MOST_BYTES >> 20} MiB; is that a pager?")
                return httpx.Response(answer.status_code, content=bytes(content))
        except (TimeoutError, httpx.TimeoutException):
            raise LatepageError(f"{self._address}: no answer within {PATIENCE:g} s", call="recv") from None
        except httpx.HTTPError as error:
            why = _root(error)
            said = (why.strerror if isinstance(why, OSError) else None) or str(why) or type(why).__name__
            raise LatepageError(
                f"{self._address}: {said}; does `latepage serve --metrics` run there?",
                call="connect",
                errno=why.errno if isinstance(why, OSError) else None,
            ) from None

    def _document(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            document = json.loads(answer.content)
        except ValueError:
            document = None
        if answer.status_code != httpx.codes.OK or not isinstance(document, dict) or "version" not in document:
            raise LatepageError(f"{self._address}: what answers there is no pager's status server (status {answer.status_code})")
        if document["version"] != VERSION:
            raise LatepageError(
                f"{self._address}: the pager speaks version {document['version']} of /vms and this `top` version {VERSION}; "
                "use the `latepage` that the pager was started with"
            )
        return document

    def _understood(self, read: Callable[[dict[str, Any]], T], document: dict[str, Any]) -> T:
        try:
            return read(document)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise LatepageError(f"{self._address}: the answer is not what it should be: {type(error).__name__} {error}") from None


def _root(error: BaseException) -> BaseException:
    """What lies under an error of the library's."""
    while (under := error.__cause__ or error.__context__) is not None:
        error = under
    return error
