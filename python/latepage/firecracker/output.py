"""What VMMs write to their standard output and error: read on a thread, so that no VMM ever waits for us."""

import contextlib
import os
import selectors
import threading
from collections.abc import Callable

__all__ = ["OutputReader", "Tail"]

KEPT = 64 << 10
"""Bytes of each stream that are kept."""


class Tail:
    """The last of what came through one pipe; it may be asked from any thread."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._dropped = 0
        self._closed = False
        self._change = threading.Condition()

    def take(self, data: bytes) -> None:
        """Adds what came; nothing means that the other end was closed."""
        with self._change:
            self._bytes += data
            excess = len(self._bytes) - KEPT
            if excess > 0:
                del self._bytes[:excess]
                self._dropped += excess
            self._closed = self._closed or not data
            self._change.notify_all()

    @property
    def end(self) -> int:
        """How many bytes have come in all: a place to begin a `wait_for` at."""
        with self._change:
            return self._dropped + len(self._bytes)

    def wait_for(self, text: bytes | str, timeout: float, start: int = 0) -> bytes:
        """Waits for a line that contains `text`, among what came after the first `start` bytes, and returns that line.

        Raises:
            TimeoutError: it did not come in time, or the other end was closed before; the message has what came.
        """
        wanted = text.encode() if isinstance(text, str) else text

        def found() -> bytes | None:
            after = bytes(self._bytes[max(0, start - self._dropped) :])
            lines = after.split(b"\n")[:-1]
            return next((line for line in lines if wanted in line), None)

        line: bytes | None = None

        def settled() -> bool:
            nonlocal line
            line = found()
            return line is not None or self._closed

        with self._change:
            self._change.wait_for(settled, timeout)
            if line is None:
                raise TimeoutError(f"{wanted!r} never came; the last that came: {bytes(self._bytes[-2000:])!r}")
            return line

    def wait_closed(self, timeout: float) -> bool:
        """Waits until all has come that will come."""
        with self._change:
            return self._change.wait_for(lambda: self._closed, timeout)

    def text(self) -> str:
        """What is kept, as text."""
        with self._change:
            return bytes(self._bytes).decode(errors="replace")


class OutputReader:
    """One thread that reads any number of pipes."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._ending = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def keep(self, descriptor: int) -> Tail:
        """Reads a pipe to its end from now on, and closes it then."""
        tail = Tail()
        os.set_blocking(descriptor, False)
        with self._lock:
            # epoll takes it while the thread waits in it.
            self._selector.register(descriptor, selectors.EVENT_READ, tail.take)
        return tail

    def close(self) -> None:
        """Ends the thread. Pipes that are still open at the other end are closed: their writers get EPIPE."""
        self._ending = True
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            os.close(key.fd)
            if key.data is not None:
                key.data(b"")
        self._selector.close()
        os.close(self._wake_write)

    def _run(self) -> None:
        while not self._ending:
            for key, _ in self._selector.select():
                take: Callable[[bytes], None] | None = key.data
                if take is None:
                    continue
                try:
                    data = os.read(key.fd, 1 << 16)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                take(data)
                if not data:
                    with self._lock:
                        self._selector.unregister(key.fd)
                    os.close(key.fd)


def lines_at_end(text: str, count: int) -> str:
    r"""The last lines of a text.

    >>> lines_at_end("a\nb\nc\n", 2)
    'b\nc'
    """
    return "\n".join(text.rstrip("\n").split("\n")[-count:])
