"""Two hundred restores of the reference VMM through one pager, twenty at a time."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from actors.serve import Serve
from latepage.kvm import Job, VmProcess

pytestmark = pytest.mark.needs("/dev/userfaultfd")

AT_ONCE = 20
MEMORY = 4 << 20


def test_two_hundred_restores_twenty_at_a_time_leave_nothing_behind(serve: Callable[..., Serve], folder: Path) -> None:
    state, memory = folder / "vm.state", folder / "vm.mem"
    with VmProcess.create(Job("fill", seed=7), memory=MEMORY, save=(state, memory)) as vm:
        vm.event("saved")
        assert vm.wait() == 0
    pager = serve("--populate", "background", source=memory)

    def twenty() -> None:
        """Half of them as Firecracker does it, the other half in memory that the pager maps, too."""
        with ExitStack() as stack:
            vms = [
                stack.enter_context(
                    VmProcess.restore(
                        state,
                        Job("verify", order="random", seed=number),
                        pager=pager.socket,
                        handshake="latepage" if number % 2 else "firecracker",
                        backing="shared" if number % 2 else "anonymous",
                    )
                )
                for number in range(AT_ONCE)
            ]
            for vm in vms:
                report = vm.done()
                assert (report.pages, report.wrong_pages) == (512, 0)
                assert vm.wait() == 0
        for vm in vms:
            assert pager.event("ended", vm=f"vm-{vm.pid}")["reason"] == "gone"

    twenty()  # what is made once, such as an allocator's arenas, is there from now on
    before = pager.held()
    assert before[2] == []
    resident = [pager.resident()]
    for _ in range(2):
        for _ in range(100 // AT_ONCE):
            twenty()
        assert pager.held() == before
        resident.append(pager.resident())
    assert resident[2] < resident[1] + (512 << 10), f"5 KiB are left of each VM of the second half: {resident}"
