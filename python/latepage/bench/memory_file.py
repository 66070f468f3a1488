"""Memory files for benches: in the page cache or not, as the bench wants it."""

import ctypes
import mmap
import os
import time
from pathlib import Path

from latepage.bench.machine import LackingError
from latepage.memory import PAGE

__all__ = ["cool", "share_cached", "warm"]


MOMENT, MOMENTS = 0.01, 100
"""Between two tries to drop a file, in seconds, and how many there are."""


def share_cached(path: Path) -> float:
    """The share of a file's pages that the page cache has.

    By mincore(2): a read that must not wait (RWF_NOWAIT) has the kernel read ahead all the same.
    """
    size = path.stat().st_size
    pages = -(-size // PAGE)
    found = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        view = (ctypes.c_char * size).from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(view), ctypes.c_size_t(size), found)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}", str(path))
    return sum(bytes(found).translate(LOWEST_BIT)) / pages


LOWEST_BIT = bytes(number & 1 for number in range(256))
"""mincore(2) promises the lowest bit of each byte only."""


def warm(path: Path) -> None:
    """Has the whole file in the page cache."""
    if share_cached(path) == 1.0:
        return
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def cool(path: Path) -> None:
    """Has nothing of the file in the page cache; it must have been synced.

    Raises:
        LackingError: the kernel keeps it, as it keeps what lies in memory by its nature (tmpfs), and what a process has mapped.
    """
    # A pager unmaps the file in the moment after its last VM has ended.
    for _ in range(MOMENTS):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = share_cached(path)
        if left <= 0.01:
            break
        time.sleep(MOMENT)
    else:
        raise LackingError(f"{100 * left:.0f} % of {path} stays in memory: set TMPDIR to a folder on a disk")
