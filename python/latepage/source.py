"""Where the contents of guest memory come from."""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from latepage import _core, zero_maps
from latepage._callbacks import Told, called_for, summary
from latepage.errors import SourceError
from latepage.memory import PAGE, format_size

__all__ = ["CallbackSource", "FileSource", "Source", "open_source"]

Supply: TypeAlias = Callable[[int, int], bytes | bytearray | memoryview | None]
"""What supplies contents: offset and length in bytes, both multiples of the VM's page size; None stands for zeros."""


class Source:
    """Where the contents of guest memory come from: what `Pager.listen` takes.

    `open_source` opens one by its name, `CallbackSource` makes one of a function. A source may serve any number of VMs, through
    any number of sockets and pagers.
    """

    def __init__(self, native: _core.FileSource | _core.CallbackSource) -> None:
        self._native = native

    @property
    def size(self) -> int:
        """Bytes of guest memory that it holds."""
        return self._native.size

    def __str__(self) -> str:
        """What it is, as log lines name it."""
        return self._native.describe()

    def __repr__(self) -> str:
        return f"<latepage.{type(self).__name__} {self}, {self.size} bytes>"

    @contextmanager
    def _listened_with(self) -> Iterator[None]:
        """Around the call that has a pager listen: what the source needs for that is there when it begins."""
        yield

    def _settle(self) -> None:
        """After a pager was closed: what only that pager needed is gone when this returns, unless user's code holds it up."""


class FileSource(Source):
    """A memory file that was opened for serving. `open_source` makes one.

    Its holes and its zero pages become zero pages in the guest, never copies. While it is served, nobody should write to
    it: replace a snapshot by renaming a new file over the old one.
    """


class CallbackSource(Source):
    """A function as a source: `fn(offset, length)` returns that many bytes of the memory, or None for zeros.

    It is called on threads of the source's own, several at a time, and never on a thread that serves faults: however long it
    takes, only VMs that need it wait. What it raises, and an answer that is too short, too long or too late, fails the page
    closed: the VM is treated as the policy's `on_missing` says, and never sees a zero page. The event says why; the first
    traceback goes to the logger `latepage`. docs/source.md tells the rest.

    >>> memory = bytes(range(256)) * 4096
    >>> source = CallbackSource(lambda offset, length: memory[offset : offset + length], size=len(memory), name="made up")
    >>> source
    <latepage.CallbackSource callback made up, 1048576 bytes>

    Args:
        fn: supplies contents. Both of its arguments are multiples of the VM's page size (4 KiB; 2 MiB for hugetlb), and
            their sum is at most `size`.
        size: bytes of guest memory: the end of the VM's regions, a multiple of 4 KiB.
        threads: how many calls are made at once. As many threads again stand in for those whose call is past its limit.
        batch: the most bytes that one call asks for, a multiple of 4 KiB; never less than one page of the VM.
        time_limit: seconds that a call may take until its page fails; None for as long as it likes.
        name: what it is called in log lines; by default what `fn` is called.

    Raises:
        SourceError: a value makes no sense.
    """

    _native: _core.CallbackSource

    def __init__(
        self,
        fn: Supply,
        *,
        size: int,
        threads: int = 4,
        batch: int = 1 << 20,
        time_limit: float | None = 30.0,
        name: str | None = None,
    ) -> None:
        if not callable(fn):
            raise SourceError(f"fn is {fn!r}: give a function of offset and length that returns bytes, or None for zeros")
        if not (PAGE <= size < 1 << 52 and size % PAGE == 0):
            raise SourceError(f"size is {size}: give the bytes of the guest's memory, a multiple of {format_size(PAGE)}")
        if not 1 <= threads <= 64:
            raise SourceError(f"threads is {threads}: give a number from 1 to 64")
        if not (PAGE <= batch <= 64 << 20 and batch % PAGE == 0):
            raise SourceError(f"batch is {batch}: give a multiple of {format_size(PAGE)}, up to 64 MiB")
        if time_limit is not None and not 0 < time_limit <= 86_400:
            raise SourceError(f"time_limit is {time_limit}: give seconds above zero, or None for no limit")
        called = name or getattr(fn, "__qualname__", None) or type(fn).__qualname__
        super().__init__(_core.CallbackSource(f"callback {called}", size, threads, batch, time_limit))
        self._fn = fn
        self._time_limit = time_limit
        self._told = Told()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        _sources.add(self)

    @contextmanager
    def _listened_with(self) -> Iterator[None]:
        self._native.hold()
        try:
            self._start()
            yield
        finally:
            self._native.release()

    def _start(self) -> None:
        """Starts the threads that are missing. They end by themselves when no pager listens with the source any more."""
        while self._native.hire():
            # They must not keep a program from ending whose callback never returns.
            thread = threading.Thread(target=self._work, name=f"latepage {self}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._native.dismiss()
                raise SourceError(f"{self}: its threads cannot start: {error}", call="clone") from None
            with self._lock:
                self._threads.append(thread)

    def _work(self) -> None:
        with called_for(str(self)):
            while (call := self._native.take()) is not None:
                self._supply(*call)

    def _supply(self, call: int, offset: int, length: int) -> None:
        began = time.monotonic()
        try:
            contents = self._fn(offset, length)
            wanted = self._native.answer(call, None if contents is None else _as_bytes(contents))
        except BaseException as error:  # SystemExit too: the next page needs the thread
            wanted = self._native.fail(call, summary(error))
            self._told.error(f"{self}: no {length} bytes at offset {offset:#x}", error)
        took = time.monotonic() - began
        if not wanted and self._time_limit is not None and took >= self._time_limit:
            self._told.warning(
                f"{self}: the call for {length} bytes at offset {offset:#x} took {took:.1f} s, and its page had failed after "
                f"{self._time_limit} s (told once; events name every failure)"
            )

    def _settle(self) -> None:
        if not self._native.open:
            self._join(1.0)

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            # One whose callback hangs is left to itself: it ends when the callback returns.
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._threads = [thread for thread in self._threads if thread.is_alive()]


_sources: weakref.WeakSet[CallbackSource] = weakref.WeakSet()


@atexit.register
def _retire() -> None:
    """No thread of ours wakes up in an interpreter that is going away."""
    sources = list(_sources)
    for source in sources:
        source._native.retire()
    for source in sources:
        source._join(0.2)


def _as_bytes(contents: object) -> bytes:
    if isinstance(contents, bytes):
        return contents
    try:
        return memoryview(contents).tobytes()  # type: ignore[arg-type]
    except TypeError:
        kind = type(contents).__qualname__
        raise SourceError(f"it returned {kind}, and contents are bytes-like, or None for zeros") from None


def open_source(reference: str | os.PathLike[str], *, zero_map: bool = False) -> FileSource:
    """Opens what a VM's memory shall come from: the path of a memory file.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "guest.mem")
    >>> _ = path.write_bytes(bytes(1 << 20))
    >>> open_source(path).size
    1048576
    >>> open_source("/nowhere/guest.mem")
    Traceback (most recent call last):
    ...
    latepage.errors.SourceError: memory file /nowhere/guest.mem: ...

    Args:
        reference: the path.
        zero_map: use what is kept in the user's cache folder of which pages are zero, and add to it what becomes known
            (docs/scan.md).

    Raises:
        SourceError: it is missing, unreadable, empty, or no regular file.
    """
    path = os.fspath(reference)
    if not path:
        raise SourceError("a source is the path of a memory file, and this one is empty; name the file")
    kind, colon, _ = path.partition(":")
    if colon and kind in ("image", "peer"):
        raise SourceError(f"{path}: a source is the path of a memory file; {kind}: is not known to this version")
    maps = zero_maps.folder() if zero_map else None
    return FileSource(_core.open_file(path, None if maps is None else os.fspath(maps)))
