"""`--metrics ADDRESS` and `--metrics-per-vm`: what a command that is a pager tells of itself over HTTP."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from cyclopts import Parameter

from latepage.errors import PolicyError
from latepage.observe.address import Address, UnixAddress, parse_address
from latepage.pager import Pager

__all__ = ["StatusAddress", "telling", "valid_address"]


def valid_address(_type: object, text: str | None) -> None:
    """Refuses what is no address, before anything is done."""
    if text is not None:
        parse_address(text)


StatusAddress = Annotated[str | None, Parameter(validator=valid_address)]
"""`HOST:PORT`, `:PORT`, `[IPV6]:PORT`, or the path of a Unix socket."""


@contextmanager
def telling(command: str, pager: Pager, address: str | None, *, per_vm: bool = False) -> Iterator[None]:
    """Tells how the pager is at that address, if there is one, and says where on standard error.

    Raises:
        ListenError: the address is taken, or not this machine's.
        PolicyError: `per_vm` without an address.
    """
    if address is None:
        if per_vm:
            raise PolicyError("--metrics-per-vm tells nothing by itself: give --metrics ADDRESS too")
        yield
        return
    from latepage.observe.status_server import StatusServer

    with StatusServer(pager, address, per_vm=per_vm) as server:
        for line in _where(server.address, server.url):
            print(f"latepage {command}: {line}", file=sys.stderr, flush=True)
        yield


def _where(address: Address, url: str) -> Iterator[str]:
    """Where the pager answers, and who else than this machine can ask it."""
    if isinstance(address, UnixAddress):
        yield f"metrics at {url}"
        return
    everywhere = f"metrics at every address of this machine, port {address.port}"
    yield f"{everywhere}: {url}" if address.is_everywhere else f"metrics at {url}"
    if not address.is_local:
        yield (
            "warning: others than this machine can reach the metrics, without a password, and read what VMs there are; "
            f"127.0.0.1:{address.port} or a Unix socket keeps them here"
        )
