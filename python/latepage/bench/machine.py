"""What a machine has of what the benches take."""

import fcntl
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from latepage.errors import LatepageError

__all__ = ["LackingError", "compiler", "cores", "described", "descriptors", "huge_pages", "need_userfaultfd", "two_cores"]

DEVICE = Path("/dev/userfaultfd")
POOL = Path("/proc/sys/vm/nr_hugepages")


class LackingError(LatepageError):
    """The machine lacks something, so that a way, or a whole question, is left out."""


def compiler() -> str:
    """The C compiler: CC, or cc.

    Raises:
        LackingError: there is none.
    """
    named = os.environ.get("CC", "cc")
    found = shutil.which(named)
    if found is None:
        raise LackingError(f"there is no C compiler ({named}): install gcc and the C library's headers, or set CC")
    return found


def need_userfaultfd() -> None:
    """Sees that VMs can be made here.

    Raises:
        LackingError: this user may not use /dev/userfaultfd.
    """
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise LackingError(f"no access to {DEVICE}: `latepage check` says how to get it")


def cores() -> list[int]:
    """The cores that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def described() -> str:
    """What was measured on, and when: a line that goes with figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    count, linux = len(cores()), ".".join(platform.release().split(".")[:2])
    return f"measured on {count} core{'s' * (count > 1)} of {model}, Linux {linux}, {date.today().isoformat()}"


def two_cores() -> tuple[int, int]:
    """Two cores: for the guest, and for whoever serves it.

    Raises:
        LackingError: there is one.
    """
    found = cores()
    if len(found) < 2:
        raise LackingError("there is one core only: nothing can run on another one than the guest")
    return found[-1], found[0]


def descriptors(wanted: int) -> None:
    """Raises the soft limit of open files, which processes that are started from now on inherit.

    Raises:
        LackingError: the hard limit is lower.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise LackingError(f"a process may open {hard:,} files, and this takes {wanted:,}: raise it (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many free pages of 2 MiB in the pool; whoever else changes it through this waits.

    Raises:
        LackingError: they cannot be had.
    """
    try:
        pool = POOL.open()
    except OSError as error:
        raise LackingError(f"there is no pool of 2 MiB pages: {error.strerror}") from None
    with pool:
        fcntl.flock(pool, fcntl.LOCK_EX)
        before = int(POOL.read_text())
        try:
            POOL.write_text(str(before + count))
        except OSError as error:
            raise LackingError(f"no pages of 2 MiB can be reserved ({POOL}): {error.strerror}") from None
        try:
            if int(POOL.read_text()) < before + count:
                raise LackingError(f"memory does not yield {count} pages of 2 MiB")
            yield
        finally:
            POOL.write_text(str(before))
