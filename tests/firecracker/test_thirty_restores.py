"""Thirty restores of a real Firecracker through one pager, ten at a time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from actors.firecracker_vm import MIB, SPELL, FirecrackerVm, Snapshot
from actors.serve import Serve

AT_ONCE = 10


def test_thirty_restores_ten_at_a_time_leave_nothing_behind(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot
) -> None:
    pager = start_pager(snapshot.memory, "--populate", "background")

    def ten() -> None:
        with ExitStack() as stack:
            vms = [stack.enter_context(start_vm()) for _ in range(AT_ONCE)]
            with ThreadPoolExecutor(AT_ONCE) as at_once:
                list(at_once.map(lambda vm: vm.load(snapshot.state, pager.socket), vms))
            for vm in vms:
                vm.tell("verify random")
            for vm in vms:
                found = vm.event("verified", SPELL)
                assert (found["pages"], found["wrong"]) == (snapshot.pages, 0)
        for vm in vms:
            assert pager.event("ended", vm=f"vm-{vm.pid}")["reason"] == "gone"

    ten()  # what is made once, such as an allocator's arenas, is there from now on
    before, resident = pager.held(), pager.resident()
    for _ in range(3):
        ten()
    assert pager.held() == before
    # A session has one byte a page, 8 KiB here, and its fixed part; thirty times that would show.
    assert pager.resident() < resident + MIB // 2
    assert pager.seen("failed") == []
