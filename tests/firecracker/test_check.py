"""`latepage check` on an unchanged Firecracker: who serves it, and that it hangs once its pager was killed."""

from collections.abc import Callable

from actors.check import check
from actors.firecracker_vm import FirecrackerVm, Snapshot
from actors.serve import Serve
from latepage.check import check_vm, proc


def test_a_firecracker_is_seen_served_and_then_hanging(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot
) -> None:
    pager = start_pager(snapshot.memory)
    vm = start_vm()
    vm.load(snapshot.state, pager.socket)
    pager.event("session-started")
    served = check_vm(vm.pid)
    assert (served.verdict, served.kvm) == ("served", True)
    assert [holder.process.pid for holder in served.holders] == [pager.pid]
    assert sum(region.size for region in served.regions) == snapshot.memory.stat().st_size
    pager.child.kill()
    pager.child.wait()
    vm.tell("verify random")
    while not proc.threads(vm.pid):
        pass
    said = check(vm.pid, "--json")
    assert (said.status, said.report["verdict"]) == (1, "hangs")
    assert "firecracker" in said.report["command"]
    assert [(thread["name"], thread["stuck"]) for thread in said.report["waiting"]] == [("fc_vcpu 0", True)]
