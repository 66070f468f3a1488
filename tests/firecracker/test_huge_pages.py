"""Real VMs whose memory is made of pages of 2 MiB."""

from collections.abc import Callable
from pathlib import Path

import pytest

from actors.firecracker_vm import MIB, FirecrackerVm, Snapshot
from actors.huge_pages import huge_pages
from actors.serve import Serve
from latepage.firecracker import MemoryBackend, Version

MEMORY = 32 * MIB


def boot(vm: FirecrackerVm, guest: Path, balloon_run: int) -> None:
    """Boots the guest in pages of 2 MiB, with a balloon that takes pages in runs of that many."""
    if vm.api.version() < Version(1, 14):
        pytest.skip(f"Firecracker {vm.api.version()} has no balloon where pages are of 2 MiB; 1.14 has")
    vm.boot(guest, MEMORY, f"balloon-run={balloon_run}", huge_pages="2M")


@pytest.mark.parametrize("populate", ["none", "background"])
def test_a_vm_of_2_mib_pages_is_right_and_so_is_its_balloon(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], guest: Path, folder: Path, populate: str
) -> None:
    with huge_pages(MEMORY // (2 * MIB)):
        with start_vm() as vm:
            # Firecracker discards what the guest gives away, and of pages of 2 MiB the kernel discards whole ones only.
            boot(vm, guest, balloon_run=512)
            vm.save(folder / "huge.state", folder / "huge.mem")
        pager = start_pager(folder / "huge.mem", "--populate", populate)
        before = pager.held()
        with start_vm() as vm:
            vm.load(folder / "huge.state", pager.socket)
            assert pager.event("session-started")["backing"] == "hugetlb"
            vm.balloon(10 * MIB)
            assert vm.verify()["skipped"] == 10 * MIB >> 12
            assert vm.balloon(0)["not_zero"] == 0
            vm.balloon(16 * MIB)
            assert vm.ask("change", "changed")["wrong"] == 0
            assert vm.balloon(2 * MIB)["not_zero"] == 0
            assert vm.balloon(0)["not_zero"] == 0
            assert vm.verify("sequential")["pages"] == (MEMORY - 2 * MIB) >> 12
            assert "madvise failed" not in vm.said()
        assert pager.event("ended")["reason"] == "gone"
        assert pager.held() == before
        assert pager.seen("failed") == []


def test_the_guest_tells_what_its_balloon_gave_away_and_nobody_discarded(
    start_vm: Callable[[], FirecrackerVm], guest: Path
) -> None:
    with huge_pages(MEMORY // (2 * MIB)):
        vm = start_vm()
        # Runs of 128 KiB: the kernel refuses to discard parts of a page of 2 MiB, and Firecracker goes on.
        boot(vm, guest, balloon_run=32)
        vm.balloon(4 * MIB)
        assert vm.balloon(0)["not_zero"] == 4 * MIB >> 12
        vm.verify()
        vm.child.kill()
        vm.child.wait()


def test_a_snapshot_of_small_pages_may_be_restored_to_pages_of_2_mib(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot
) -> None:
    vm = start_vm()
    if vm.api.version() < Version(1, 17):
        pytest.skip(f"Firecracker {vm.api.version()} cannot change the size of pages when it loads; 1.17 can")
    pager = start_pager(snapshot.memory)
    with huge_pages(MEMORY // (2 * MIB)):
        vm.api.load_snapshot(snapshot.state, MemoryBackend("Uffd", str(pager.socket)), resume=True, huge_pages="2M")
        assert pager.event("session-started")["backing"] == "hugetlb"
        assert vm.verify("random")["pages"] == snapshot.pages
        assert vm.ask("change", "changed")["wrong"] == 0
        assert vm.verify("sequential")["pages"] == snapshot.pages
        vm.child.kill()
        vm.child.wait()
        assert pager.event("ended")["faults"] <= MEMORY // (2 * MIB)
