"""A pager's status over HTTP: /metrics, /healthz, /readyz, /vms and /vms/NAME, on a TCP port or a Unix socket.

A thread takes connections, and each has one of its own for its one request: whoever is slow or says nothing holds up nobody.
A connection lasts `PATIENCE` seconds at most, and there are `MOST_CONNECTIONS` at most: the oldest goes when one more comes.
None of this is on the path of a fault.
"""

import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import BaseServer, TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import parse_qs, unquote, urlsplit

from prometheus_client.exposition import choose_encoder

from latepage import __version__
from latepage.errors import LatepageError, ListenError
from latepage.observe.address import Address, TcpAddress, parse_address
from latepage.observe.listening import Listening, listen
from latepage.observe.metrics import registry
from latepage.observe.vms import MOST_CELLS, all_vms, one_vm
from latepage.pager import Pager

__all__ = ["StatusServer"]

PATIENCE = 10.0
"""Seconds that a connection may last."""

MOST_CONNECTIONS = 64

CELLS = 128
"""Cells of a VM's memory, unless /vms/NAME asks for more or fewer."""

OUT_OF_DESCRIPTORS_PAUSE = 0.2
"""Seconds without a look at the socket when a connection could not be taken: it stays readable, and the loop would spin."""

TEXT = "text/plain; charset=utf-8"

INDEX = """\
/metrics    for Prometheus
/healthz    200 while this process answers
/readyz     200 while VMs are taken, else 503
/vms        all VMs, as JSON
/vms/NAME   one VM, as JSON; ?cells=N divides its memory into N cells
"""


class StatusServer:
    """Tells how a pager is, for as long as it is entered. Leave it before the pager is closed.

    >>> import tempfile, urllib.request
    >>> with Pager() as pager, StatusServer(pager, "127.0.0.1:0") as server:
    ...     urllib.request.urlopen(f"{server.url}/healthz").read().strip()
    b'ok'

    Args:
        pager: whose status.
        address: `HOST:PORT`, `:PORT` (every address of this machine), `[IPV6]:PORT`, or the path of a Unix socket. Port 0
            takes a free one; `address` then says which.
        per_vm: metrics for each VM as well, labelled with its name.

    Raises:
        ListenError: on entering: the address makes no sense, is taken, or is not this machine's.
    """

    def __init__(self, pager: Pager, address: str, per_vm: bool = False) -> None:
        self._pager = pager
        self._wanted = address
        self._per_vm = per_vm

    def __enter__(self) -> Self:
        try:
            wanted = parse_address(self._wanted)
        except ValueError as error:
            raise ListenError(str(error), call="bind") from None
        self._listening = listen(wanted)
        try:
            self._server = _Server(self._listening, _Status(self._pager, self._per_vm))
        except OSError as error:
            self._listening.close()
            message = f"status server at {self._wanted}: {error.strerror} (open files: ulimit -n)"
            raise ListenError(message, call="eventfd", errno=error.errno) from None
        self._thread = threading.Thread(target=self._server.run, name="latepage-status", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._server.server_close()
            raise ListenError(f"status server at {self._wanted}: no thread can be started: {error}", call="clone") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.stop()
        self._thread.join()
        self._server.server_close()

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._listening.address

    @property
    def url(self) -> str:
        """The same for a person: `http://HOST:PORT`, or the path of the socket."""
        address = self.address
        return address.url if isinstance(address, TcpAddress) else f"unix:{address.path}"


Answer = tuple[HTTPStatus, str, bytes]


class _Status:
    """What is answered. It raises `KeyError` where there is no such thing, `ValueError` where a question makes no sense."""

    def __init__(self, pager: Pager, per_vm: bool) -> None:
        self._pager = pager
        self._registry = registry(pager, per_vm=per_vm)
        self.told: set[type[Exception]] = set()

    def answer(self, path: str, query: dict[str, list[str]], accept: str) -> Answer:
        known: dict[str, Callable[[], Answer]] = {
            "/": lambda: (HTTPStatus.OK, TEXT, INDEX.encode()),
            "/metrics": lambda: self._metrics(accept),
            "/healthz": lambda: (HTTPStatus.OK, TEXT, b"ok\n"),
            "/readyz": self._ready,
            "/vms": lambda: _json(all_vms(self._pager)),
        }
        if path in known:
            return known[path]()
        if path.startswith("/vms/"):
            name = unquote(path.removeprefix("/vms/"))
            return _json(one_vm(self._pager.session(name), _cells(query)))
        raise KeyError(path)

    def _metrics(self, accept: str) -> Answer:
        try:
            encode, kind = choose_encoder(accept)
        except Exception:  # it reads some headers that make no sense as none of its own making: TypeError, for one
            encode, kind = choose_encoder("")
        return HTTPStatus.OK, kind, encode(self._registry)

    def _ready(self) -> Answer:
        if self._pager.ready:
            return HTTPStatus.OK, TEXT, b"ready\n"
        why = b"draining, or closed: no new VM is taken\n" if self._pager.sockets else b"not listening yet\n"
        return HTTPStatus.SERVICE_UNAVAILABLE, TEXT, why


def _cells(query: dict[str, list[str]]) -> int:
    text = query.get("cells", [str(CELLS)])[-1]
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MOST_CELLS)) and 1 <= int(text) <= MOST_CELLS):
        raise ValueError(f"cells is {text[:20]!r}: give a number from 1 to {MOST_CELLS}")
    return int(text)


def _json(value: Any) -> Answer:
    return HTTPStatus.OK, "application/json", json.dumps(value).encode() + b"\n"


class _Handler(BaseHTTPRequestHandler):
    """One request of one connection."""

    # The longest that one call on the socket takes; the server ends the whole after the same time.
    timeout = PATIENCE
    server_version = f"latepage/{__version__}"
    sys_version = ""
    error_content_type = TEXT
    error_message_format = "%(code)d %(message)s\n"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _refuse(self) -> None:
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, TEXT, b"405 this can only be read\n", Allow="GET, HEAD")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def _answer(self, *, body: bool) -> None:
        try:
            target = urlsplit(self.path)
            query = parse_qs(target.query, max_num_fields=16)
            answer = cast("_Server", self.server).status.answer(target.path, query, self.headers.get("Accept", ""))
        except KeyError:
            answer = (HTTPStatus.NOT_FOUND, TEXT, f"404 there is nothing here; there is:\n{INDEX}".encode())
        except ValueError as error:
            answer = (HTTPStatus.BAD_REQUEST, TEXT, f"400 {error}\n".encode(errors="replace"))
        except LatepageError as error:
            answer = (HTTPStatus.SERVICE_UNAVAILABLE, TEXT, f"503 {error}\n".encode())
        except Exception as error:  # whatever it is, the pager goes on
            status = cast("_Server", self.server).status
            if type(error) not in status.told:
                # Once: anybody may ask again and again, and standard error is the pager's log.
                status.told.add(type(error))
                logging.getLogger(__name__).exception("status server: %s could not be answered", self.path)
            text = f"500 {type(error).__name__}: {error}\n"
            answer = (HTTPStatus.INTERNAL_SERVER_ERROR, TEXT, text.encode(errors="replace"))
        self._send(*answer, body=body)

    def _send(self, status: HTTPStatus, kind: str, content: bytes, *, body: bool = True, **headers: str) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the library's name)
        """Says nothing: standard error is the pager's log."""


class _Server(ThreadingMixIn, TCPServer):
    """Takes connections until it is stopped."""

    daemon_threads = False
    block_on_close = True
    # handle_request() is only called when there is something to take.
    timeout = 0

    def __init__(self, listening: Listening, status: _Status) -> None:
        self.status = status
        # Past TCPServer's own, which would make a socket.
        BaseServer.__init__(self, ("", 0), _Handler)
        self.socket = listening.socket
        self._listening = listening
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._ending = False
        self._stopped = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def run(self) -> None:
        """The loop of the thread that takes connections."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        poll.register(self._stopped, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poll.poll(self._until_next_end())]
            if self._stopped in ready:
                return
            self._end_overdue()
            if self.socket.fileno() in ready:
                self.handle_request()

    def stop(self) -> None:
        """Ends the loop."""
        with self._ended:
            self._ending = True
            self._ended.notify_all()
        os.eventfd_write(self._stopped, 1)

    def server_close(self) -> None:
        """Ends all connections, waits for their threads, and gives back the address. Only after the loop."""
        self._listening.close()
        with self._lock:
            for connection in self._open:
                _hang_up(connection)
        super().server_close()
        os.close(self._stopped)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Takes a connection."""
        try:
            return super().get_request()
        except BlockingIOError:
            raise  # it has gone again
        except OSError:
            poll = select.poll()
            poll.register(self._stopped, select.POLLIN)
            poll.poll(OUT_OF_DESCRIPTORS_PAUSE * 1000)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002 (the library's)
        """Remembers until when a connection may last."""
        with self._ended:
            if len(self._open) >= MOST_CONNECTIONS:
                _hang_up(min(self._open, key=self._open.__getitem__))
                # Threads and descriptors are bounded too: the next one waits until that one's are free. A VM's come first.
                self._ended.wait_for(lambda: self._ending or len(self._open) < MOST_CONNECTIONS, PATIENCE)
                if self._ending or len(self._open) >= MOST_CONNECTIONS:
                    return False
            self._open[request] = time.monotonic() + PATIENCE
        return True

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection, under the lock: nobody hangs up on a descriptor that is another's by now."""
        with self._ended:
            self._open.pop(request, None)
            super().shutdown_request(request)
            self._ended.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone, or was too slow: nothing to tell."""

    def _until_next_end(self) -> float | None:
        """Milliseconds until a connection has lasted for long enough."""
        with self._lock:
            ends = min(self._open.values(), default=None)
        return None if ends is None else max(0.0, ends - time.monotonic()) * 1000 + 1

    def _end_overdue(self) -> None:
        now = time.monotonic()
        with self._lock:
            for connection, ends in self._open.items():
                if ends <= now:
                    _hang_up(connection)
                    self._open[connection] = now + PATIENCE


def _hang_up(connection: socket.socket) -> None:
    """Has the thread that reads from it, or writes to it, find it ended."""
    with suppress(OSError):  # the client was quicker
        connection.shutdown(socket.SHUT_RDWR)
