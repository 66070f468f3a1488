"""Placement: where the threads that serve faults run, and what is said where a wish cannot be had."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.memory_file import PAGE, first_byte
from actors.peer import Peer
from actors.serve import Serve
from latepage import Pager, Policy, PolicyError, open_source


def _touch_until(vm: Peer, done: Callable[[], bool]) -> None:
    """Faults without end: a page that is discarded and touched again is a fault each time."""
    assert vm.read(7) == first_byte(7)
    while not done():
        vm.discard(7)
        assert vm.read(7) == 0


@pytest.mark.needs("/dev/userfaultfd")
@pytest.mark.parametrize("placement", ["auto", "same-core", "spin", "core:last"])
def test_a_worker_follows_a_vm_that_faults_a_lot_and_comes_back(
    folder: Path, memory_file: Path, peer: Callable[[], Peer], placement: str
) -> None:
    placement = placement.replace("last", str(max(os.sched_getaffinity(0))))
    with Pager(workers=1) as pager:
        pager.listen(folder / "s", open_source(memory_file), Policy(placement=placement, fault_around=PAGE))
        assert pager.workers == ["block"]
        vm = peer()
        vm.map(256 * PAGE)
        vm.introduce(folder / "s")
        chosen = "spin" if placement == "spin" else "core"
        _touch_until(vm, lambda: pager.workers == [chosen])
        vm.child.kill()
        for event in pager.events(timeout=60):
            if event.event == "ended":
                break
        # Nobody faults any more.
        while pager.workers != ["block"]:
            os.sched_yield()
        assert pager.fallbacks == []


@pytest.mark.needs("/dev/userfaultfd")
def test_block_stays_where_it_is(folder: Path, memory_file: Path, peer: Callable[[], Peer]) -> None:
    with Pager(workers=1) as pager:
        pager.listen(folder / "s", open_source(memory_file), Policy(placement="block", fault_around=PAGE))
        vm = peer()
        vm.map(256 * PAGE)
        vm.introduce(folder / "s")
        seen: list[str] = []

        def seen_enough() -> bool:
            seen.extend(pager.workers)
            return len(seen) == 300

        _touch_until(vm, seen_enough)
        assert set(seen) == {"block"}


@pytest.mark.needs("/dev/userfaultfd")
def test_a_core_that_is_not_there_is_told_once_and_the_vm_is_served(
    serve: Callable[..., Serve], peer: Callable[[], Peer]
) -> None:
    pager = serve("--placement", "core:1023")
    warning = pager.event("warning")
    assert "placement core:1023: this process has no core 1023, only" in warning["what"]
    assert warning["what"].endswith("VMs are placed as with auto")
    vm = peer()
    vm.map(256 * PAGE)
    vm.introduce(pager.socket)
    assert vm.read(9) == first_byte(9)


def test_what_is_not_allowed_is_told_once_for_all_workers(folder: Path, memory_file: Path) -> None:
    folder.chmod(0o777)
    memory_file.chmod(0o644)
    code = f"""
import os, resource
from latepage import *
resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))
resource.setrlimit(resource.RLIMIT_NICE, (0, 0))
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
with Pager(workers=3, realtime=10, nice=-5) as pager:
    pager.listen({str(folder / "s")!r}, open_source({str(memory_file)!r}), Policy(placement="core:1023"))
    for wish, reason in pager.fallbacks:
        print(wish, "|", reason)
    print(sorted(event.what for event in pager.events(timeout=0) if event.event == "warning")
        == sorted(fallback.reason for fallback in pager.fallbacks))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    lines = ran.stdout.splitlines()
    assert [line.partition(" |")[0] for line in lines] == ["realtime", "nice", "placement", "True"], ran.stderr
    assert "SCHED_FIFO 10" in lines[0]
    assert "CAP_SYS_NICE, or RLIMIT_RTPRIO of 10" in lines[0]
    assert "RLIMIT_NICE of 25" in lines[1]


@pytest.mark.needs_root
def test_workers_are_real_time_and_nice_as_they_were_told(folder: Path) -> None:
    def classes(pager: Pager) -> list[tuple[int, int]]:
        threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        named = [(thread, Path(f"/proc/self/task/{thread}/comm").read_text()) for thread in threads]
        workers = [thread for thread, name in named if name.startswith("latepage-w")]
        assert len(workers) == len(pager.workers)
        return [(os.sched_getscheduler(worker), os.getpriority(os.PRIO_PROCESS, worker)) for worker in workers]

    with Pager(workers=2, nice=-3) as pager:
        if pager.fallbacks:
            pytest.skip(pager.fallbacks[0].reason)
        assert classes(pager) == [(os.SCHED_OTHER, -3)] * 2
    with Pager(workers=2, realtime=3) as pager:
        if pager.fallbacks:
            pytest.skip(pager.fallbacks[0].reason)
        assert {scheduler for scheduler, _ in classes(pager)} == {os.SCHED_FIFO}


@pytest.mark.parametrize(("wish", "value"), [("realtime", 0), ("realtime", 100), ("nice", -21), ("nice", 20)])
def test_a_priority_that_there_is_not_is_refused(wish: str, value: int) -> None:
    with pytest.raises(PolicyError, match=rf"{wish} is {value}: give a"):
        Pager(**{wish: value})
