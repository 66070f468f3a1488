"""A VM at the other end of its API socket."""

import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from latepage.errors import GuestError
from latepage.kvm.requests import Requests, result_of

__all__ = ["Client"]


class Client(Requests):
    """A connection to a VM's API socket. It is one conversation: threads need one each."""

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(self._path)
        except OSError as error:
            self._socket.close()
            why = error.strerror or str(error)
            raise GuestError(
                f"API socket {self._path}: {why} (does a VM with --api-sock run there?)",
                call="connect",
                errno=error.errno,
            ) from None
        self._lines = self._socket.makefile("rb")

    def request(self, what: str, **fields: Any) -> Any:
        """Asks for `what` and returns the result as plain JSON."""
        try:
            self._socket.sendall(json.dumps({"do": what, **fields}).encode() + b"\n")
            answer = self._lines.readline()
        except OSError as error:
            raise GuestError(f"API socket {self._path}: {error}", call="recv", errno=error.errno) from None
        if not answer:
            raise GuestError(f"API socket {self._path}: the VM ended before it answered")
        return result_of(answer.decode(), None)

    def close(self) -> None:
        """Closes the connection; the VM goes on."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
