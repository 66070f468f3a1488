"""A listening socket at an address, taken only if nobody else has it, and given back."""

import errno
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from latepage.errors import ListenError
from latepage.observe.address import Address, TcpAddress, UnixAddress

__all__ = ["Listening", "listen"]

MODE = 0o660
"""Permissions of a Unix socket, those of the pager's own by default."""

BACKLOG = 128


@dataclass(frozen=True, slots=True)
class Listening:
    """A socket that listens and never blocks.

    Attributes:
        socket: the socket.
        address: where; with the port that was found where port 0 was asked for.
        identity: device and inode of a Unix socket's file: it is removed only while it still is this socket's.
    """

    socket: socket.socket
    address: Address
    identity: tuple[int, int] | None = None

    def close(self) -> None:
        """Closes it, and removes the file of a Unix socket."""
        self.socket.close()
        if isinstance(self.address, UnixAddress) and self.identity == _identity(self.address.path):
            with suppress(FileNotFoundError):
                Path(self.address.path).unlink()


def listen(address: Address) -> Listening:
    """Listens at an address. A stale Unix socket is replaced.

    Raises:
        ListenError: it is taken, or cannot be listened at.
    """
    try:
        made = _listen_tcp(address) if isinstance(address, TcpAddress) else _listen_unix(address)
    except OSError as error:
        raise ListenError(f"status server at {address}: {_why(address, error)}", call="bind", errno=error.errno) from None
    made.socket.setblocking(False)
    return made


def _why(address: Address, error: OSError) -> str:
    """What went wrong, and what to do next."""
    if isinstance(error, socket.gaierror):
        return (
            f"{address.host if isinstance(address, TcpAddress) else address}: {error.strerror}; name an address of this machine"
        )
    match error.errno:
        case errno.EADDRINUSE:
            return "another process is listening there; stop it, or choose another"
        case errno.EADDRNOTAVAIL:
            return "this machine has no such address; `ip address` lists what it has"
        case errno.EACCES | errno.EPERM if isinstance(address, TcpAddress):
            return "a port below 1024 needs CAP_NET_BIND_SERVICE; choose a higher one"
        case errno.ENOENT | errno.ENOTDIR:
            return f"there is no folder {Path(str(address)).parent}; make it first"
    return error.strerror or str(error)


def _listen_tcp(address: TcpAddress) -> Listening:
    if address.host:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, where = found[0]
        made = socket.create_server(where, family=family, backlog=BACKLOG)
    else:
        made = _listen_everywhere(address.port)
    bound, port = made.getsockname()[:2]
    return Listening(made, TcpAddress(address.host, port, bound))


def _listen_everywhere(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
        except OSError as error:
            # IPv6 is built in and turned off.
            if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                raise
    return socket.create_server(("", port), family=socket.AF_INET, backlog=BACKLOG)


def _listen_unix(address: UnixAddress) -> Listening:
    path = Path(address.path)
    if os.path.lexists(path):
        mode = path.lstat().st_mode
        if not stat.S_ISSOCK(mode):
            what = "a directory" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "a file"
            raise OSError(errno.EEXIST, f"there is {what} of that name, which is not replaced; choose another path")
        _remove_stale(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(address.path)
        listening = Listening(made, address, _identity(address.path))
    except BaseException:
        made.close()
        raise
    try:
        # Nobody can connect before listen(2), so nobody does with other rights than these.
        path.chmod(MODE)
        made.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _remove_stale(path: Path) -> None:
    """Removes a socket that nobody has open any more; one that lives is somebody else's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except FileNotFoundError:
            return  # it has gone just now
        except OSError as error:
            # A full queue, or another kind of socket: alive.
            if error.errno not in {errno.EAGAIN, errno.EPROTOTYPE}:
                raise
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _identity(path: str) -> tuple[int, int] | None:
    try:
        there = Path(path).lstat()
    except OSError:
        return None
    return there.st_dev, there.st_ino
