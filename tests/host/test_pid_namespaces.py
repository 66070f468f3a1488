"""A pager in a pid namespace that its VMs are not in: it serves them, and can do no more to them than that."""

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.check import check
from actors.memory_file import PAGE, first_byte
from actors.peer import Peer
from actors.serve import Serve
from latepage.check import proc

pytestmark = [pytest.mark.needs_root, pytest.mark.needs("/dev/userfaultfd")]

SIZE = 256 * PAGE


@pytest.fixture
def under() -> tuple[str, ...]:
    """What puts a pager into a pid namespace of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare to make a pid namespace with")
    return ("unshare", "--pid", "--fork", "--kill-child")


def test_a_vm_that_cannot_be_seen_is_served_and_its_end_is_noticed(
    folder: Path, memory_file: Path, peer: Callable[[], Peer], under: tuple[str, ...]
) -> None:
    with Serve(folder / "pager.sock", memory_file, under=under) as pager:
        pager.event("listening")
        vm = peer()
        vm.map(SIZE)
        vm.introduce(pager.socket)
        started = pager.event("session-started")
        # SO_PEERCRED gives no process: the VM has no name but the session's.
        assert started["pid"] == 0
        assert started["vm"].startswith("session-")
        assert vm.read_all() == [first_byte(page) for page in range(256)]
        vm.child.kill()
        assert pager.event("ended", vm=started["vm"])["reason"] == "gone"


def test_a_vm_that_cannot_be_seen_is_not_killed_but_held_and_reported(
    folder: Path, memory_file: Path, peer: Callable[[], Peer], under: tuple[str, ...]
) -> None:
    with memory_file.open("r+b") as writer, Serve(folder / "pager.sock", memory_file, under=under) as pager:
        pager.event("listening")
        vm = peer()
        vm.map(SIZE)
        vm.introduce(pager.socket)
        assert vm.read(3) == first_byte(3)
        writer.truncate(SIZE // 2)
        vm.touch(200)
        failed = pager.event("failed")
        assert failed["action"].startswith("held")
        assert vm.child.poll() is None
        # Never a wrong page: whoever runs the VM must end it.
        assert [line for line in vm.lines if line["did"] == "touched" and line["page"] == 200] == []
        vm.signal(signal.SIGKILL)
        pager.event("ended")


@pytest.mark.parametrize("pager_alive", [True, False])
def test_in_a_container_check_does_not_say_that_a_pager_outside_is_none(
    folder: Path, memory_file: Path, under: tuple[str, ...], pager_alive: bool
) -> None:
    if shutil.which("nsenter") is None:
        pytest.skip("no nsenter to look into a pid namespace with")
    own_proc = subprocess.run([*under, "--mount-proc", "true"], capture_output=True, text=True, check=False)
    if own_proc.returncode:
        pytest.skip(f"no /proc of its own in a pid namespace here: {own_proc.stderr.strip()}")
    with Serve(folder / "pager.sock", memory_file) as pager, Peer(under=(*under, "--mount-proc")) as vm:
        pager.event("listening")
        vm.map(SIZE)
        vm.introduce(pager.socket, form="latepage", name="vm-7")
        pager.event("session-started", vm="vm-7")
        assert vm.read(3) == first_byte(3)
        if not pager_alive:
            pager.child.kill()
            pager.child.wait()
        outside = int(Path(f"/proc/{vm.pid}/task/{vm.pid}/children").read_text())
        inside = check(1, "--json", under=("nsenter", "--target", str(outside), "--pid", "--mount"))
        assert (inside.status, inside.report["verdict"]) == (0, "unseen"), inside
        assert "end it" not in inside.report["todo"]
        assert inside.report["unseen"] == ["processes outside of this container"]
        from_the_host = check(outside, "--json").report
        # The tests may run in a container themselves.
        alone = "unseen" if proc.is_enclosed() else "unserved"
        assert from_the_host["verdict"] == ("served" if pager_alive else alone)
