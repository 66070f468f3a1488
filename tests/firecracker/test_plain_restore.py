"""A real Firecracker, restored by `latepage serve`: its memory is right, and nothing is left of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from actors.firecracker_vm import MIB, FirecrackerVm, Snapshot, is_static, seccomp_modes
from actors.serve import Serve

PAGE = 4096


@pytest.mark.parametrize("populate", ["none", "background"])
def test_a_restored_guest_finds_every_page_as_it_left_it(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot, populate: str
) -> None:
    pager = start_pager(snapshot.memory, "--populate", populate)
    before = pager.held()
    with start_vm() as vm:
        vm.load(snapshot.state, pager.socket)
        assert pager.event("session-started")["form"] == "firecracker"
        assert vm.verify("random")["pages"] == snapshot.pages
        assert vm.verify("sequential")["pages"] == snapshot.pages
        assert vm.ask("change", "changed")["wrong"] == 0
        assert vm.verify("random")["pages"] == snapshot.pages
        if populate == "background":
            assert pager.event("populated")["failed"] == 0
    ended = pager.event("ended")
    assert ended["reason"] == "gone"
    if populate == "none":
        assert ended["faults"] > 0
        assert ended["lacking"] > 0, "the guest does not touch what is below its pages"
    else:
        assert ended["lacking"] == 0
    assert pager.held() == before


def test_pages_that_are_written_first_are_right_as_well(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot
) -> None:
    pager = start_pager(snapshot.memory, "--fault-around", "4KiB")
    vm = start_vm()
    vm.load(snapshot.state, pager.socket)
    vm.ask("fill", "filled")
    assert vm.verify("random")["pages"] == snapshot.pages


def test_one_wrong_byte_is_found_by_the_guest_and_its_page_named(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot, folder: Path
) -> None:
    contents = bytearray(snapshot.memory.read_bytes())
    contents[4321 * PAGE] ^= 1
    wrong = folder / "wrong.mem"
    wrong.write_bytes(contents)
    pager = start_pager(wrong)
    vm = start_vm()
    vm.load(snapshot.state, pager.socket)
    found = vm.ask("verify random", "verified")
    assert (found["wrong"], found["page"]) == (1, 4321)
    assert int(found["found"], 16).to_bytes(8, "little") == contents[4321 * PAGE :][:8]


def test_every_byte_of_a_vm_that_never_ran_is_in_its_next_snapshot(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot, folder: Path
) -> None:
    pager = start_pager(snapshot.memory)
    vm = start_vm()
    vm.load(snapshot.state, pager.socket, resume=False)
    vm.api.create_snapshot(folder / "again.state", folder / "again.mem")
    first, again = snapshot.memory.read_bytes(), (folder / "again.mem").read_bytes()
    assert len(first) == len(again) == 32 * MIB
    differing = [at for at in range(0, len(first), PAGE) if first[at : at + PAGE] != again[at : at + PAGE]]
    # Firecracker itself writes two pages of its own below 1 MiB when it loads: the VM's generation id and its clock.
    assert len(differing) <= 2
    assert all(at < MIB for at in differing)


def test_it_all_happens_under_firecrackers_own_seccomp_filters(
    start_vm: Callable[[], FirecrackerVm], start_pager: Callable[..., Serve], snapshot: Snapshot, firecracker: Path
) -> None:
    if not is_static(firecracker):
        pytest.skip("this firecracker is not linked with musl: its filters, if it has any, let everything pass")
    pager = start_pager(snapshot.memory)
    vm = start_vm()
    vm.load(snapshot.state, pager.socket)
    vm.verify()
    modes = seccomp_modes(vm.pid)
    if set(modes.values()) == {"0"}:
        pytest.skip("this firecracker was built without seccomp filters")
    assert set(modes.values()) == {"2"}, modes
    assert {"fc_api", "fc_vcpu 0"} <= modes.keys()
