"""Memory for guests: huge pages, and files that two processes can map."""

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from latepage.check.capabilities import read_setting
from latepage.check.items import Item, known

__all__ = ["memory_items"]

POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
F_ADD_SEALS, F_SEAL_SEAL, F_SEAL_SHRINK = 1033, 1, 2


def memory_items() -> Iterator[Item]:
    """The subject `memory`."""
    total, free = read_setting(f"{POOL}/nr_hugepages"), read_setting(f"{POOL}/free_hugepages")
    more = read_setting(f"{POOL}/nr_overcommit_hugepages")
    if total is None:
        found = "this kernel has none" if not Path(POOL).is_dir() else "not shown here"
    else:
        found = f"{free:,} of {total:,} free" + (f", {more:,} more on demand" if more else "")
    some = None if total is None and Path(POOL).is_dir() else bool((free or 0) + (more or 0))
    yield Item(
        key="memory.hugetlb_2mib",
        name="pool of 2 MiB pages",
        state=known(some),
        found=found,
        value=None if total is None else {"total": total, "free": free, "overcommit": more},
        todo="only for guests on huge pages: sysctl vm.nr_hugepages=N, before they start" if some is False else None,
    )
    try:
        file = os.memfd_create("latepage-check", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            fcntl.fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL)
        finally:
            os.close(file)
        failed = None
    except OSError as error:
        failed = errno.errorcode.get(error.errno or 0, str(error))
    yield Item(
        key="memory.memfd",
        name="sealed memory files",
        state=known(failed is None),
        found="one was made and sealed (memfd_create)" if failed is None else f"memfd_create: {failed}",
        value=failed is None,
        todo=None if failed is None else "guests on shared memory need them: see vm.memfd_noexec and seccomp filters",
    )
