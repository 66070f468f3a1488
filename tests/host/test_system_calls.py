"""What one fault costs in system calls: a wait, a read, an install, and nothing else. Counted by strace(1)."""

import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.memory_file import PAGE, first_byte, write_memory_file
from actors.peer import Peer
from actors.serve import Serve

PAGES = 4096
FAULTS = 600
ONCE = 40
"""Calls beside those of faults that a worker may make while it is watched: to adopt a VM, to be called by another thread."""


def counts(summary: str) -> dict[str, int]:
    """Calls by their names, from the table of `strace -c`."""
    rows = [line.split() for line in summary.splitlines()]
    return {row[-1]: int(row[3]) for row in rows if len(row) >= 5 and row[3].isdigit() and row[-1] != "total"}


@pytest.mark.needs("/dev/userfaultfd")
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("install", ["copy", "continue"])
def test_a_fault_is_a_wait_a_read_and_an_install(
    serve: Callable[..., Serve], peer: Callable[[], Peer], folder: Path, install: str
) -> None:
    memory = write_memory_file(folder / "large.mem", PAGES)
    # No look at where it runs: that is other threads' work, which is not counted here.
    pager = serve("--fault-around", "4KiB", "--placement", "block", source=memory)
    vm = peer()
    vm.map(PAGES * PAGE, backing="anonymous" if install == "copy" else "shared")
    vm.introduce(pager.socket, form="latepage")
    pages = random.Random(1).sample(range(PAGES), FAULTS + 50)
    for page in pages[:50]:
        assert vm.read(page) == first_byte(page)
    tasks = Path(f"/proc/{pager.pid}/task")
    workers = [task.name for task in tasks.iterdir() if (task / "comm").read_text().startswith("latepage-w")]
    out = folder / "strace"
    watched = [argument for worker in workers for argument in ("-p", worker)]
    with subprocess.Popen(["strace", "-c", "-o", out, *watched], stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        attached = 0
        while attached < len(workers):
            line = strace.stderr.readline()
            if not line or "ptrace" in line:
                strace.wait()
                pytest.skip(f"strace may not look at the pager: {line.strip()}")
            attached += "attached" in line
        for page in pages[50:]:
            assert vm.read(page) == first_byte(page)
        strace.send_signal(signal.SIGINT)
        strace.stderr.read()
        strace.wait()
    made = counts(out.read_text())
    waits = made.pop("epoll_wait", 0) + made.pop("epoll_pwait", 0) + made.pop("epoll_pwait2", 0)
    reads, installs = made.pop("preadv2"), made.pop("ioctl")
    writes = made.pop("pwrite64", 0)
    assert FAULTS <= reads <= FAULTS + ONCE
    # A call that a worker was in when strace came is not counted.
    assert FAULTS - len(workers) <= waits <= FAULTS + ONCE
    assert FAULTS <= installs <= FAULTS + ONCE
    # Shared memory is filled by its file, and then exposed.
    assert writes <= (0 if install == "copy" else FAULTS)
    assert sum(made.values()) <= ONCE, made
