"""A fault that waits too long is told of with its VM, address and age, for whatever reason it waits."""

from collections.abc import Callable
from pathlib import Path

import pytest

from actors.memory_file import PAGE
from actors.peer import Peer
from actors.serve import Serve

pytestmark = pytest.mark.needs("/dev/userfaultfd")

SIZE = 256 * PAGE
STRANGER = 65534
WITHOUT_CAP_KILL = ("setpriv", "--bounding-set", "-kill")


@pytest.mark.needs_root
def test_a_vm_that_cannot_be_killed_is_held_and_its_fault_is_told_of(
    folder: Path, memory_file: Path, peer: Callable[[], Peer]
) -> None:
    vm = peer()
    vm.map(SIZE)
    vm.ask("become", uid=STRANGER)
    folder.chmod(0o755)
    flags = ("--mode", "0666", "--stall-warning", "0.2", "--fault-around", "4KiB")
    with (
        memory_file.open("r+b") as writer,
        Serve(folder / "pager.sock", memory_file, *flags, under=WITHOUT_CAP_KILL) as pager,
    ):
        pager.event("listening")
        assert "CAP_KILL" in pager.said(), "what it lacks is said when it starts"
        name = vm.introduce(pager.socket)
        pager.event("session-started", vm=name)
        writer.truncate(SIZE // 2)
        vm.touch(200)
        failed = pager.event("failed", vm=name)
        assert failed["action"] not in ("killed", "poisoned")
        stall = pager.event("stall", vm=name)
        assert stall["address"] == failed["address"] == vm.hva + 200 * PAGE
        assert stall["age"] >= 0.2
        assert not [line for line in vm.lines if line["did"] == "touched"], "never a zero page"


def test_an_empty_pool_of_huge_pages_is_told_of_and_tried_again(
    folder: Path, serve: Callable[..., Serve], peer: Callable[[], Peer]
) -> None:
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if int(pool.read_text()):
        pytest.skip("the pool of huge pages is not empty")
    huge = folder / "huge.mem"
    huge.write_bytes(b"\x07" * (4 << 20))
    pager, vm = serve("--stall-warning", "0.2", source=huge), peer()
    vm.map(4 << 20, "hugetlb")
    name = vm.introduce(pager.socket)
    vm.touch(1)
    assert pager.event("no-memory", vm=name)["address"] == vm.hva + (2 << 20)
    assert pager.event("stall", vm=name)["address"] == vm.hva + (2 << 20)
