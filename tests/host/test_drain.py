"""The end of a pager: SIGTERM lets no VM down; a second one is the operator's word."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.memory_file import PAGE, first_byte
from actors.peer import Peer
from actors.serve import Serve

pytestmark = pytest.mark.needs("/dev/userfaultfd")

SIZE = 256 * PAGE


def test_sigterm_without_a_vm_ends_at_once(serve: Callable[..., Serve]) -> None:
    pager = serve()
    pager.signal(signal.SIGTERM)
    assert pager.finish() == 0
    assert [line["event"] for line in pager.lines] == ["listening", "draining", "drained"]


@pytest.mark.parametrize(("form", "backing"), [("firecracker", "anonymous"), ("latepage", "shared")], ids=["copied", "shared"])
def test_sigterm_gives_the_vms_all_that_they_lack_and_lets_them_go(
    serve: Callable[..., Serve], peer: Callable[[], Peer], form: str, backing: str
) -> None:
    pager, vms = serve(), [peer(), peer()]
    names = []
    for vm in vms:
        vm.map(SIZE, backing)
        names.append(vm.introduce(pager.socket, form=form))
        assert vm.read(3) == first_byte(3)
    pager.signal(signal.SIGTERM)
    assert pager.finish() == 0
    assert {line["vm"] for line in pager.seen("populated")} == set(names)
    assert {line["vm"] for line in pager.seen("detached")} == set(names)
    for vm in vms:
        assert vm.read_all() == [first_byte(page) for page in range(256)]
        vm.discard(9)  # would hang for ever, were its memory still registered
        assert vm.read(9) == 0


def test_sighup_however_often_only_asks_to_finish(serve: Callable[..., Serve], peer: Callable[[], Peer]) -> None:
    # A terminal that is closed may send two: one by its shell, one by the kernel.
    pager, vm = serve(), peer()
    vm.map(SIZE, "private")
    name = vm.introduce(pager.socket, form="latepage")
    assert vm.read(3) == first_byte(3)
    pager.signal(signal.SIGHUP)
    pager.event("waiting-for", vm=name)
    pager.signal(signal.SIGHUP)
    vm.child.kill()
    assert pager.finish() == 0


def test_sighup_stays_ignored_where_it_was(folder: Path, memory_file: Path) -> None:
    with Serve(folder / "pager.sock", memory_file, under=("nohup",)) as pager:
        pager.event("listening")
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pager.pid}/status").read_text().splitlines())
        assert int(status["SigIgn"], 16) >> (signal.SIGHUP - 1) & 1
        assert int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1


def test_the_drain_waits_for_private_memory_and_names_its_vm_and_takes_no_other(
    serve: Callable[..., Serve], peer: Callable[[], Peer]
) -> None:
    pager, vm, late = serve(), peer(), peer()
    vm.map(SIZE, "private")
    name = vm.introduce(pager.socket, form="latepage")
    assert vm.read(3) == first_byte(3)
    pager.signal(signal.SIGTERM)
    pager.event("waiting-for", vm=name)
    late.map(SIZE)
    assert "error" in late.ask("connect", path=str(pager.socket))
    vm.discard(3)
    assert vm.read(3) == 0
    assert vm.read(4) == first_byte(4)
    vm.child.kill()
    assert pager.finish() == 0


def test_a_second_sigterm_fails_closed_and_names_whom(
    serve: Callable[..., Serve], peer: Callable[[], Peer], memory_file: Path
) -> None:
    # A writer who was there first can truncate the file: half of it cannot be had.
    with memory_file.open("r+b") as writer:
        pager, lacking, full = serve(), peer(), peer()
        for vm in (lacking, full):
            vm.map(SIZE)
            vm.introduce(pager.socket)
        assert full.read_all() == [first_byte(page) for page in range(256)]
        assert lacking.read(3) == first_byte(3)
        writer.truncate(SIZE // 2)
        pager.signal(signal.SIGTERM)
        pager.event("waiting-for", vm=f"vm-{lacking.pid}")
        pager.signal(signal.SIGTERM)
        assert pager.finish() == 1
    assert f"vm-{lacking.pid}" in pager.said()
    assert f"vm-{full.pid}" not in pager.said()
    assert lacking.finish() == -9
    assert full.read(200) == first_byte(200)
