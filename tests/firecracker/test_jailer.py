"""Real Firecracker in its jailer: the pager listens inside the jail, and the memory file never enters it."""

import os
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.firecracker_vm import QUIET, SPELL, RestoredGuest, Snapshot, find_program
from latepage import FirecrackerError
from latepage.firecracker import Jailer, Owner, restore

pytestmark = pytest.mark.needs_root

OWNER = Owner(23456, 34567)


@pytest.fixture(scope="session")
def jailer_program(firecracker: Path) -> Path:
    """The jailer to test with."""
    program, why = find_program("jailer", "JAILER", beside=firecracker)
    if program is None:
        pytest.skip(why)
    return program


@pytest.fixture
def jails(folder: Path) -> Iterator[Path]:
    """A folder for jails; the test must leave nothing in it."""
    base = folder / "jails"
    base.mkdir()
    yield base
    assert list(base.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("--new-pid-ns",)], ids=["", "in a pid namespace of its own"])
def test_a_jailed_vm_gets_its_memory_and_leaves_no_jail(
    firecracker: Path, jailer_program: Path, jails: Path, snapshot: Snapshot, arguments: tuple[str, ...]
) -> None:
    jailer = Jailer(program=jailer_program, owner=OWNER, chroot_base=jails, id="vm", arguments=arguments)
    with restore(snapshot.state, snapshot.memory, firecracker=firecracker, jailer=jailer, arguments=QUIET) as restored:
        vm = restored.vm
        root = jails / firecracker.name / "vm" / "root"
        assert (vm.jail, vm.api_sock) == (root, root / "run/firecracker.socket")
        assert os.stat(f"/proc/{vm.pid}").st_uid == OWNER.uid  # noqa: PTH116 (no file, but a process)
        sock = (root / "pager.sock").lstat()
        assert (stat.S_ISSOCK(sock.st_mode), sock.st_uid, sock.st_gid) == (True, OWNER.uid, OWNER.gid)
        # Neither the memory file nor, once it is loaded, the state file.
        assert not [path for path in root.rglob("*") if path.is_file() and path.name not in (firecracker.name, "firecracker.pid")]
        session = restored.session(vm)
        assert session is not None
        assert session.pid == vm.pid
        assert RestoredGuest(vm).verify()["pages"] == snapshot.pages


def test_clones_get_a_jail_each_however_long_its_path_is(
    firecracker: Path, jailer_program: Path, jails: Path, snapshot: Snapshot, folder: Path
) -> None:
    base = jails / ("a-folder-whose-name-is-long" * 4)
    base.mkdir()
    # The jail is named after the program itself, not after a link to it.
    link = folder / "link"
    link.symlink_to(firecracker)
    jailer = Jailer(program=jailer_program, owner=OWNER, chroot_base=base, id="vm")
    options = {"firecracker": link, "jailer": jailer, "arguments": QUIET, "clones": 2}
    with restore(snapshot.state, snapshot.memory, **options) as restored:
        assert [vm.jail for vm in restored.vms] == [base / firecracker.name / f"vm-{clone}" / "root" for clone in (1, 2)]
        assert all(len(os.fsencode(vm.api_sock)) < 108 for vm in restored.vms)
        for vm in restored.vms:
            assert RestoredGuest(vm).verify()["pages"] == snapshot.pages
    base.rmdir()


def test_a_jail_that_was_made_ready_keeps_what_is_not_ours(
    firecracker: Path, jailer_program: Path, jails: Path, snapshot: Snapshot
) -> None:
    root = jails / firecracker.name / "vm" / "root"
    (root / "dev").mkdir(parents=True)
    for name in ("disk.img", "dev/mine"):
        (root / name).write_text("precious")
    jailer = Jailer(program=jailer_program, owner=OWNER, chroot_base=jails, id="vm")
    with (
        restore(snapshot.state, snapshot.memory, firecracker=firecracker, jailer=jailer),
        pytest.raises(FirecrackerError, match="a VM has been in it, and may still be"),
    ):
        restore(snapshot.state, snapshot.memory, firecracker=firecracker, jailer=jailer)
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == ["disk.img", "mine"]
    for path in (root / "disk.img", root / "dev/mine"):
        path.unlink()
    for folder in (root / "dev", root, root.parent, root.parent.parent):
        folder.rmdir()


def test_how_a_vm_in_a_pid_namespace_of_its_own_ended_is_not_told_wrong(
    firecracker: Path, jailer_program: Path, jails: Path, snapshot: Snapshot
) -> None:
    jailer = Jailer(program=jailer_program, owner=OWNER, chroot_base=jails, arguments=("--new-pid-ns",))
    with restore(snapshot.state, snapshot.memory, firecracker=firecracker, jailer=jailer) as restored:
        os.kill(restored.vm.pid, signal.SIGKILL)
        assert restored.wait(SPELL)
        # It was no child of ours: the jailer was, and ended well.
        assert restored.vm.process.status is None
        assert "cannot be told" in restored.vm.process.how_it_ended()


@pytest.mark.parametrize("arguments", [(), ("--new-pid-ns",)], ids=["", "in a pid namespace of its own"])
def test_what_the_jailed_firecracker_says_of_a_bad_snapshot_is_passed_on(
    firecracker: Path, jailer_program: Path, jails: Path, snapshot: Snapshot, folder: Path, arguments: tuple[str, ...]
) -> None:
    broken = folder / "broken.state"
    contents = bytearray(snapshot.state.read_bytes())
    contents[len(contents) // 2] ^= 1
    broken.write_bytes(contents)
    jailer = Jailer(program=jailer_program, owner=OWNER, chroot_base=jails, arguments=arguments)
    with pytest.raises(FirecrackerError, match="damaged") as caught:
        restore(broken, snapshot.memory, firecracker=firecracker, jailer=jailer, clones=2)
    assert "Failed to get snapshot state from file" in str(caught.value.fault_message)


def test_what_the_jailer_itself_says_is_passed_on(
    firecracker: Path, jailer_program: Path, jails: Path, snapshot: Snapshot
) -> None:
    jailer = Jailer(program=jailer_program, owner=OWNER, chroot_base=jails, arguments=("--netns", "/no/such/namespace"))
    with pytest.raises(FirecrackerError, match="No such file or directory"):
        restore(snapshot.state, snapshot.memory, firecracker=firecracker, jailer=jailer)


def test_a_jailed_vm_that_was_let_go_keeps_its_jail(
    firecracker: Path, jailer_program: Path, jails: Path, snapshot: Snapshot
) -> None:
    jailer = Jailer(program=jailer_program, owner=OWNER, chroot_base=jails, id="vm")
    restored = restore(snapshot.state, snapshot.memory, firecracker=firecracker, jailer=jailer)
    assert restored.leave(timeout=60) == []
    vm = restored.vm
    assert vm.lives_on
    with vm.client() as client:
        assert client.info().state == "Running"
    pidfd = os.pidfd_open(vm.pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    assert vm.jail is not None
    assert not (vm.jail / "pager.sock").exists()
    # What is left of it is the user's to remove.
    shutil.rmtree(jails / firecracker.name)
