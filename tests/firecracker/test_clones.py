"""Many real VMs of one snapshot with one pager, and what the end of one is to the others."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from actors.firecracker_vm import SPELL, FirecrackerVm, Snapshot
from actors.serve import Serve
from latepage.firecracker import FirecrackerError


@pytest.mark.parametrize("populate", ["none", "background"])
def test_eight_clones_at_once_have_memories_of_their_own(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot, populate: str
) -> None:
    pager = start_pager(snapshot.memory, "--populate", populate)
    before = pager.held()
    with ExitStack() as stack:
        vms = [stack.enter_context(start_vm()) for _ in range(8)]
        with ThreadPoolExecutor(len(vms)) as at_once:
            list(at_once.map(lambda vm: vm.load(snapshot.state, pager.socket), vms))
        for number, vm in enumerate(vms):
            vm.tell("verify random")
            # What one writes is no other's: every second one writes its memory anew.
            if number % 2:
                vm.tell("change")
            vm.tell("verify sequential")
        for vm in vms:
            assert vm.event("verified", SPELL, order="random")["pages"] == snapshot.pages
            assert vm.event("verified", SPELL, order="sequential")["pages"] == snapshot.pages
            assert vm.ask("status", "status")["wrong"] == 0
    for vm in vms:
        assert pager.event("ended", vm=f"vm-{vm.pid}")["reason"] == "gone"
    assert pager.held() == before


def test_a_vmm_that_is_killed_amid_its_faults_leaves_nothing_and_harms_nobody(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot
) -> None:
    pager = start_pager(snapshot.memory, "--fault-around", "4KiB")
    before = pager.held()
    with start_vm() as survivor:
        survivor.load(snapshot.state, pager.socket, resume=False)
        survivor.tell("loop")
        survivor.api.resume()
        alone = pager.held()
        for _ in range(3):
            with start_vm() as victim:
                victim.load(snapshot.state, pager.socket, resume=False)
                victim.tell("verify random")
                victim.api.resume()
                started = pager.event("session-started", pid=victim.pid)
                victim.child.kill()
                ended = pager.event("ended", vm=started["vm"])
                assert ended["reason"] == "gone"
                assert ended["lacking"] > 0, "it was killed before it had all of its memory"
            assert pager.held() == alone
        survivor.event("changed", SPELL)
        survivor.tell("stop")
        assert survivor.verify()["pages"] == snapshot.pages
        assert survivor.ask("status", "status")["wrong"] == 0
    pager.event("ended")
    assert pager.held() == before


def test_a_vmm_that_is_killed_as_soon_as_it_has_shaken_hands_leaves_nothing(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot
) -> None:
    pager = start_pager(snapshot.memory, "--populate", "background")
    before = pager.held()
    for _ in range(5):
        with start_vm() as vm, ThreadPoolExecutor(1) as loader:
            loading = loader.submit(vm.load, snapshot.state, pager.socket, resume=False)
            started = pager.event("session-started", pid=vm.pid)
            vm.child.kill()
            # Its answer may have been on the way by then, or not.
            assert isinstance(loading.exception(SPELL), FirecrackerError | None)
        assert pager.event("ended", vm=started["vm"])["reason"] == "gone"
    assert pager.held() == before
