"""A pager whose io_uring is forbidden, from the start or in the middle: it says so once, and its VMs get what they should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.forbidden import IO_URING_ENTER, IO_URING_SETUP
from latepage.kvm import Job, Vm

pytestmark = pytest.mark.needs("/dev/userfaultfd")

MEMORY = 8 << 20

SERVE = """
import sys
from actors.forbidden import forbid
from latepage import *
from latepage.kvm import Job, Vm

call, socket, state, memory = int(sys.argv[1]), *sys.argv[2:]
forbid(call)
with Pager(workers=2) as pager:
    pager.listen(socket, open_source(memory), Policy(fault_around=4096))
    with Vm.restore(state, pager=socket, guest="threads") as vm:
        vm.run(Job("verify", order="random"))
        job = vm.wait()
        print(job.done, job.wrong_pages, vm.compare().wrong_pages)
    print(*(fallback.wish for fallback in pager.fallbacks))
    print(*{event.what for event in pager.events(timeout=0) if event.event == "warning"})
"""


@pytest.mark.parametrize("call", [IO_URING_SETUP, IO_URING_ENTER])
def test_without_io_uring_threads_read_what_is_not_in_memory(folder: Path, call: int) -> None:
    files = folder / "vm.state", folder / "vm.mem"
    with Vm.create("vm", memory=MEMORY, guest="threads") as vm:
        vm.run(Job("fill", seed=7))
        vm.wait()
        vm.save(*files)
    with files[1].open("rb") as memory:
        os.fsync(memory.fileno())
        os.posix_fadvise(memory.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command: list[str | Path] = [sys.executable, "-c", SERVE, str(call), folder / "s", *files]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    pages = (MEMORY - (2 << 20)) // 4096
    assert ran.stdout.splitlines()[:2] == [f"{pages} 0 0", "io_uring"], ran.stderr
    assert ran.stdout.splitlines()[2].startswith("io_uring: Operation not permitted")
