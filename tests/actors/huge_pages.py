"""Pages of 2 MiB for the time of a test."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

POOL = Path("/proc/sys/vm/nr_hugepages")


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many free pages of 2 MiB in the pool; the test skips where they cannot be had. Whoever else changes the pool waits."""
    with POOL.open() as pool:
        fcntl.flock(pool, fcntl.LOCK_EX)
        before = int(POOL.read_text())
        try:
            POOL.write_text(str(before + count))
        except OSError as error:
            pytest.skip(f"no pages of 2 MiB can be reserved: {error}")
        try:
            if int(POOL.read_text()) < before + count:
                pytest.skip("there are not enough pages of 2 MiB")
            yield
        finally:
            POOL.write_text(str(before))
