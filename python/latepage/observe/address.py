"""Where a pager tells how it is: a TCP port or a Unix socket, as a command line writes it."""

import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Literal
from urllib.parse import quote

__all__ = ["Address", "TcpAddress", "UnixAddress", "parse_address"]

LONGEST_PATH = 107
"""Bytes that fit into `sockaddr_un` with its closing zero (unix(7))."""


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A port of a host; an empty host is every address of this machine to a server, and `localhost` to a client.

    Attributes:
        host: as it was written.
        port: its number.
        bound: the numeric address at which a server listens; empty where none does.
    """

    host: str
    port: int
    bound: str = field(default="", compare=False, repr=False)

    @property
    def is_everywhere(self) -> bool:
        """Whether a server there listens at every address of this machine.

        >>> TcpAddress("", 9464).is_everywhere, TcpAddress("0", 9464, "0.0.0.0").is_everywhere
        (True, True)
        """
        return not self.host or _ip(self.bound or self.host, "is_unspecified")

    @property
    def is_local(self) -> bool:
        """Whether nobody but this machine can reach a server there.

        >>> TcpAddress("localhost", 9464, "127.0.0.1").is_local, TcpAddress("host", 9464, "10.0.0.7").is_local
        (True, False)
        """
        return _ip(self.bound or self.host, "is_loopback")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Where a client finds it.

        >>> TcpAddress("", 9464).url, TcpAddress("::1", 9464).url
        ('http://localhost:9464', 'http://[::1]:9464')
        """
        host = "localhost" if self.is_everywhere else self.host
        # The % of a link-local address's zone is an escape of its own in a URL.
        return f"http://{TcpAddress(quote(host, safe=':'), self.port)}"


def _ip(host: str, what: Literal["is_unspecified", "is_loopback"]) -> bool:
    """What is so of a numeric address; of a name nothing is known."""
    try:
        return bool(getattr(ip_address(host.partition("%")[0]), what))
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix socket."""

    path: str

    def __str__(self) -> str:
        return self.path

    @property
    def url(self) -> str:
        """What stands in the Host header; the socket itself says where to connect."""
        return "http://localhost"


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """What `HOST:PORT`, `:PORT`, `[::1]:PORT` or a path means.

    >>> parse_address("127.0.0.1:9464"), parse_address(":9464"), parse_address("[::1]:9464")
    (TcpAddress(host='127.0.0.1', port=9464), TcpAddress(host='', port=9464), TcpAddress(host='::1', port=9464))
    >>> parse_address("/run/latepage/status.sock"), parse_address("status.sock")
    (UnixAddress(path='/run/latepage/status.sock'), UnixAddress(path='status.sock'))

    Raises:
        ValueError: it is neither.
    """
    if "/" in text or (text.endswith(".sock") and ":" not in text):
        length = len(text.encode())
        if length > LONGEST_PATH:
            raise ValueError(
                f"socket {text}: the path has {length} bytes and a socket's can have {LONGEST_PATH}; "
                "choose a shorter one, or a relative one"
            )
        if "\0" in text or text.endswith("/"):
            raise ValueError(f"{text!r} is no path for a socket")
        return UnixAddress(text)
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([^\s:\[\]]*)):([0-9]{1,6})", text, re.ASCII)
    if found is None:
        raise ValueError(
            f"{text!r} is no address: write HOST:PORT, :PORT or [IPV6]:PORT, "
            "or the path of a Unix socket (with a slash, as in ./name, or ending in .sock)"
        )
    port = int(found[3])
    if port > 65_535:
        raise ValueError(f"{text!r}: there is no port {port}; ports go up to 65535")
    return TcpAddress(found[1] or found[2], port)
