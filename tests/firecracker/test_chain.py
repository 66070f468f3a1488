"""Snapshots of VMs that were restored themselves."""

from collections.abc import Callable
from pathlib import Path

from actors.firecracker_vm import MIB, FirecrackerVm, Snapshot
from actors.serve import Serve


def test_a_chain_of_three_snapshots_keeps_what_each_vm_wrote(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot, folder: Path
) -> None:
    state, memory = snapshot.state, snapshot.memory
    balloon = 0
    for link in (1, 2, 3):
        with start_vm() as vm:
            pager = start_pager(memory)
            vm.load(state, pager.socket)
            # What the VM before this one gave away is zero in its snapshot, and still zero when it comes back.
            assert vm.verify()["skipped"] == balloon >> 12
            if balloon:
                assert vm.balloon(0)["not_zero"] == 0
            # Half of the links are saved with pages that have never come: a full snapshot asks for all of them.
            assert vm.ask("change", "changed")["wrong"] == 0
            balloon = 4 * link * MIB
            vm.balloon(balloon)
            state, memory = folder / f"{link}.state", folder / f"{link}.mem"
            vm.save(state, memory)
        pager.event("ended")
    with start_vm() as vm:
        pager = start_pager(memory)
        vm.load(state, pager.socket)
        assert vm.verify("sequential")["skipped"] == 12 * MIB >> 12
        assert vm.balloon(0)["not_zero"] == 0
        assert vm.verify()["pages"] == snapshot.pages
        status = vm.ask("status", "status")
        assert (status["wrong"], status["not_zero"]) == (0, 0)


def test_a_vm_that_was_saved_in_the_middle_of_a_job_goes_on_with_it(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot, folder: Path
) -> None:
    pager = start_pager(snapshot.memory)
    with start_vm() as vm:
        vm.load(snapshot.state, pager.socket)
        vm.tell("loop")
        vm.event("verified", order="sequential")
        vm.save(folder / "busy.state", folder / "busy.mem")
    pager = start_pager(folder / "busy.mem")
    with start_vm() as vm:
        vm.load(folder / "busy.state", pager.socket)
        vm.event("changed")
        vm.tell("stop")
        assert vm.verify()["pages"] == snapshot.pages
        assert vm.ask("status", "status")["wrong"] == 0


def test_a_balloon_that_was_saved_on_its_way_arrives_after_the_restore(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot, folder: Path
) -> None:
    pager = start_pager(snapshot.memory)
    with start_vm() as vm:
        vm.load(snapshot.state, pager.socket)
        vm.api.set_balloon(24 * MIB)
        vm.save(folder / "way.state", folder / "way.mem")
    pager = start_pager(folder / "way.mem")
    with start_vm() as vm:
        vm.load(folder / "way.state", pager.socket)
        vm.balloon(16 * MIB)
        assert vm.verify()["skipped"] == 16 * MIB >> 12
        assert vm.balloon(0)["not_zero"] == 0
        assert vm.verify("sequential")["pages"] == snapshot.pages
        assert vm.ask("status", "status")["not_zero"] == 0
