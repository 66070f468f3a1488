"""`latepage check VMM-PID` says of a running VM who serves it, and whether it hangs."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.check import UNPRIVILEGED, check
from actors.memory_file import PAGE
from actors.peer import Peer
from actors.serve import Serve
from latepage import _core
from latepage.check import check_vm, proc
from latepage.errors import CheckError
from latepage.kvm import Job, VmProcess

pytestmark = pytest.mark.needs("/dev/userfaultfd")

SIZE = 256 * PAGE
PR_CAPBSET_DROP, CAP_SYS_PTRACE = 24, 19
MEMORY = 8 << 20
Peers = Callable[[], Peer]
Serves = Callable[..., Serve]


def connected(pager: Serve, vm: Peer, backing: str = "anonymous", form: str = "firecracker") -> None:
    vm.map(SIZE, backing)
    pager.event("session-started", vm=vm.introduce(pager.socket, form=form))


def waits(vm: Peer) -> None:
    """Until a thread of it waits for a page or for an event to be read."""
    while not proc.threads(vm.pid):
        pass


@pytest.mark.parametrize(("backing", "form"), [("anonymous", "firecracker"), ("shared", "latepage"), ("private", "latepage")])
def test_a_vm_that_is_served_is_said_to_be(serve: Serves, peer: Peers, backing: str, form: str) -> None:
    pager, vm = serve(), peer()
    connected(pager, vm, backing, form)
    said = check(vm.pid, "--json")
    assert (said.status, said.report["verdict"]) == (0, "served")
    (userfaultfd,) = said.report["userfaultfds"]
    assert [holder["pid"] for holder in userfaultfd["holders"]] == [pager.pid]
    assert "event_remove" in userfaultfd["features"]
    (region,) = said.report["regions"]
    assert (region["start"], region["size"], region["present"]) == (vm.hva, SIZE, 0)
    assert region["modes"] == (["missing", "minor"] if backing == "shared" else ["missing"])
    vm.read(3)
    assert check_vm(vm.pid).regions[0].present >= PAGE


def test_a_vm_whose_pager_was_killed_will_hang_and_then_hangs(serve: Serves, peer: Peers) -> None:
    pager, vm = serve(), peer()
    connected(pager, vm)
    vm.read(3)
    pager.child.kill()
    pager.child.wait()
    said = check(vm.pid, "--json")
    if os.geteuid() == 0 and not proc.is_enclosed():
        assert (said.status, said.report["verdict"]) == (1, "unserved")
    vm.touch(200)
    waits(vm)
    said = check(vm.pid, "--json")
    assert (said.status, said.report["verdict"]) == (1, "hangs")
    (thread,) = said.report["waiting"]
    assert (thread["waits_for"], thread["stuck"]) == ("page", True)
    assert said.report["userfaultfds"][0]["pending"] == said.report["userfaultfds"][0]["waiting"] == 1
    assert said.report["userfaultfds"][0]["holders"] == []
    shown = check(vm.pid)
    assert shown.status == 1
    assert "It hangs: 1 fault has waited" in " ".join(shown.output.split())


def test_a_discard_that_nobody_reads_hangs_and_no_fault_shows(serve: Serves, peer: Peers) -> None:
    pager, vm = serve(), peer()
    connected(pager, vm)
    pager.child.kill()
    pager.child.wait()
    vm.send(do="discard", page=3, pages=2)
    waits(vm)
    said = check(vm.pid, "--json").report
    assert said["verdict"] == "hangs"
    assert said["userfaultfds"][0]["waiting"] == 0
    assert [thread["waits_for"] for thread in said["waiting"] if thread["stuck"]] == ["event"]
    assert "1 discard has waited" in said["says"]


def test_a_pager_that_is_stopped_is_named_with_what_lets_it_run(serve: Serves, peer: Peers) -> None:
    pager, vm = serve(), peer()
    connected(pager, vm)
    pager.signal(signal.SIGSTOP)
    os.waitid(os.P_PID, pager.pid, os.WSTOPPED | os.WNOWAIT)
    assert check_vm(vm.pid).verdict == "unserved"
    vm.touch(7)
    waits(vm)
    report = check_vm(vm.pid)
    assert report.verdict == "hangs"
    assert report.todo == f"let it run again: kill -CONT {pager.pid}"
    pager.signal(signal.SIGCONT)
    assert "value" in vm.touched(7)
    assert check_vm(vm.pid).verdict == "served"


def test_a_pager_that_brings_no_page_is_told_from_one_that_does_not_read(folder: Path, memory_file: Path, peer: Peers) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give up CAP_KILL")
    vm = peer()
    vm.map(SIZE)
    vm.ask("become", uid=65534)
    folder.chmod(0o755)
    with (
        memory_file.open("r+b") as writer,
        Serve(folder / "pager.sock", memory_file, "--mode", "0666", under=("setpriv", "--bounding-set", "-kill")) as pager,
    ):
        pager.event("listening")
        name = vm.introduce(pager.socket)
        pager.event("session-started", vm=name)
        writer.truncate(SIZE // 2)
        vm.touch(200)
        pager.event("failed", vm=name)
        said = check(vm.pid, "--json")
        assert (said.status, said.report["verdict"]) == (1, "stalls")
        assert said.report["userfaultfds"][0]["pending"] == 0
        assert str(pager.pid) in said.report["says"]


def test_a_vm_that_was_let_go_needs_no_pager(serve: Serves, peer: Peers) -> None:
    pager, vm = serve("--populate", "background", "--detach-when-full"), peer()
    connected(pager, vm)
    pager.event("detached")
    pager.child.kill()
    pager.child.wait()
    said = check(vm.pid, "--json")
    assert (said.status, said.report["verdict"], said.report["regions"]) == (0, "full", [])


def test_a_real_vm_is_seen_with_its_vcpus(folder: Path) -> None:
    state, memory = folder / "state", folder / "memory"
    with VmProcess.create(Job("fill", seed=3), memory=MEMORY, save=(state, memory)) as vm:
        vm.event("saved")
    with Serve(folder / "pager.sock", memory) as pager:
        pager.event("listening")
        with VmProcess.restore(state, pager=folder / "pager.sock", paused=True, api_sock=folder / "vm.sock") as vm:
            guest = vm.event("started")["guest"]
            assert check_vm(vm.pid).verdict == "served"
            pager.child.kill()
            pager.child.wait()
            with vm.client() as client:
                client.resume()
                client.run(Job("verify"))
                report = check_vm(vm.pid)
                while not report.waiting:
                    report = check_vm(vm.pid)
                vm.process.kill()
            assert report.kvm == (guest == "kvm")
            assert report.verdict == "hangs"
            assert [thread.name for thread in report.stuck] == ["vcpu-0"]


def test_looking_changes_nothing_at_the_vm(serve: Serves, peer: Peers) -> None:
    pager, vm = serve(), peer()
    connected(pager, vm)
    before = Path(f"/proc/{vm.pid}/maps").read_text()
    for _ in range(3):
        assert check_vm(vm.pid).verdict == "served"
    assert Path(f"/proc/{vm.pid}/maps").read_text() == before
    assert len(vm.read_all()) == SIZE // PAGE


def test_where_kcmp_is_not_to_be_had_the_inode_tells(serve: Serves, peer: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    pager, vms = serve(), [peer(), peer()]
    for vm in vms:
        connected(pager, vm)
    monkeypatch.setattr(_core, "same_open_file", refuse)
    for vm in vms:
        report = check_vm(vm.pid)
        assert [holder.process.pid for holder in report.holders] == [pager.pid]
        assert any("kcmp" in line for line in report.unseen)


def test_what_kcmp_says_carries_its_number() -> None:
    with pytest.raises(OSError, match=r"No such process|not implemented") as refused:
        _core.same_open_file((2**22 + 1, 0), (os.getpid(), 0))
    assert refused.value.errno in (errno.ESRCH, errno.ENOSYS)


def test_a_pager_is_told_from_a_vmm_and_names_the_vms_that_it_serves(serve: Serves, peer: Peers) -> None:
    pager, vms = serve(), [peer(), peer()]
    for vm in vms:
        connected(pager, vm)
    said = check(pager.pid)
    assert said.status == 2
    served = ", ".join(str(pid) for pid in sorted(vm.pid for vm in vms))
    assert f"is no VMM but a pager: it serves {served}" in said.errors


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["table", "json"])
def test_what_is_no_vm_ends_with_2_and_says_what_it_is(flags: tuple[str, ...]) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as ended:
        said = check(ended.pid, *flags)
        assert (said.status, said.output) == (2, "")
        assert "is no VMM: it has no userfaultfd" in said.errors
        ended.kill()
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert "has ended" in check(ended.pid, *flags).errors
    said = check(ended.pid, *flags)
    assert (said.status, said.output) == (2, "")
    assert f"there is no process {ended.pid}" in said.errors


@pytest.mark.parametrize("arguments", [("x",), ("1", "--vmm-user", "root"), ("0",), ("-1",), ("1.5",)], ids=" ".join)
def test_what_is_no_process_is_not_understood(arguments: tuple[str, ...]) -> None:
    said = check(*arguments)
    assert (said.status, said.output) == (2, "")
    assert said.errors


@pytest.mark.needs_root
def test_a_vm_of_another_user_is_refused_with_whose_it_is(serve: Serves, peer: Peers) -> None:
    vm = peer()
    connected(serve(), vm)
    said = check(vm.pid, under=UNPRIVILEGED)
    assert said.status == 2
    assert "belongs to user 0; run this as root" in said.errors


@pytest.mark.needs_root
def test_root_whom_a_container_denies_a_process_is_not_told_to_be_root(serve: Serves, peer: Peers) -> None:
    vm = peer()
    connected(serve(), vm)
    said = check(vm.pid, under=("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"))
    assert said.status == 2
    assert "run this as root" not in said.errors
    assert "CAP_SYS_PTRACE" in said.errors


def test_a_vm_that_ends_under_the_look_is_an_error_and_no_traceback(peer: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = peer()
    dying.map(SIZE)
    regions = proc.regions

    def die_first(pid: int) -> tuple[proc.Region, ...]:
        dying.child.kill()
        dying.child.wait()
        return regions(pid)

    monkeypatch.setattr(proc, "regions", die_first)
    with pytest.raises(CheckError, match="ended while it was looked at"):
        check_vm(dying.pid)


@pytest.mark.needs_root
def test_whoever_may_not_look_everywhere_is_told_what_was_not_seen(serve: Serves) -> None:
    def give_up() -> None:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_PTRACE, 0, 0, 0)

    pager = serve()
    # Without CAP_SYS_PTRACE, root looks into a process that has no more rights: the VM, and not its pager.
    with Peer(preexec_fn=give_up) as vm:
        connected(pager, vm)
        said = check(vm.pid, "--json", under=("setpriv", "--bounding-set", "-sys_ptrace"))
        assert (said.status, said.report["verdict"]) == (0, "unseen")
        assert said.report["unseen"]
        assert ("host" if proc.is_enclosed() else "root") in said.report["todo"]
