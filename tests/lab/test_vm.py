"""The reference VMM on real KVM: long mode under nested paging, and a restore through `latepage serve`."""

from pathlib import Path

from actors.serve import Serve
from latepage.kvm import Job, Vm

MEMORY = 6 << 20
PAGES = (MEMORY - (2 << 20)) // 4096


def test_a_guest_finds_every_page_right_after_a_restore_through_a_pager(folder: Path) -> None:
    state, memory, socket = folder / "vm.state", folder / "vm.mem", folder / "pager.sock"
    with Vm.create("vm-7", memory=MEMORY, split=True, vcpus=2, backing="shared", guest="kvm") as vm:
        vm.run(Job("fill", seed=7))
        assert vm.wait().done == PAGES
        vm.save(state, memory)
    # Starting Python takes seconds in here.
    with Serve(socket, memory) as pager:
        pager.event("listening", patience=120)
        with Vm.restore(state, pager=socket, guest="kvm") as vm:
            vm.run(Job("verify", order="random"))
            report = vm.wait()
            assert report is not None
            assert (report.done, report.is_right) == (PAGES, True)
            assert vm.compare().is_right
