"""The balloon of a real Firecracker goes up and down while its memory is served: what was discarded reads as zero."""

from collections.abc import Callable

import pytest

from actors.firecracker_vm import MIB, SPELL, FirecrackerVm, Snapshot
from actors.serve import Serve


@pytest.mark.parametrize("populate", ["none", "background"])
def test_pages_that_the_balloon_had_read_as_zero_whether_they_had_come_or_not(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot, populate: str
) -> None:
    pager = start_pager(snapshot.memory, "--populate", populate)
    vm = start_vm()
    vm.load(snapshot.state, pager.socket)
    # Nothing has been touched yet: with `none`, most of these pages have never been there.
    vm.balloon(12 * MIB)
    assert vm.verify()["skipped"] == 12 * MIB >> 12
    assert vm.balloon(0)["not_zero"] == 0
    assert vm.verify()["pages"] == snapshot.pages
    # Now all of them are.
    vm.balloon(20 * MIB)
    assert vm.balloon(4 * MIB)["not_zero"] == 0
    assert vm.ask("change", "changed")["wrong"] == 0
    assert vm.balloon(0)["not_zero"] == 0
    assert vm.verify("sequential")["pages"] == snapshot.pages
    assert pager.seen("failed") == []


def test_the_balloon_may_go_up_and_down_while_the_guest_faults_and_population_runs(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot
) -> None:
    pager = start_pager(snapshot.memory, "--populate", "background", "--fault-around", "4KiB")
    vm = start_vm()
    vm.load(snapshot.state, pager.socket, resume=False)
    vm.tell("loop")
    vm.api.set_balloon(8 * MIB)
    vm.api.resume()
    vm.event("inflated", SPELL, given=8 * MIB >> 12)
    for size in (2, 16, 0, 24, 6):
        vm.balloon(size * MIB)
    vm.balloon(0)
    vm.tell("stop")
    vm.verify()
    status = vm.ask("status", "status")
    assert (status["wrong"], status["not_zero"], status["given"]) == (0, 0, 0)
    assert pager.seen("failed") == []
