"""What becomes of VMs that were restored, where the moment matters: played without a VMM."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from actors.faulty_firecracker import write_state_file
from latepage import FirecrackerError, Pager
from latepage.firecracker import Jailer, Owner, Restoration, RestoredVm, StateFile, Version
from latepage.firecracker.jailer import Jail
from latepage.firecracker.output import OutputReader
from latepage.firecracker.place import Folder, Place

if TYPE_CHECKING:
    from latepage.firecracker.process import VmmProcess


class DyingProcess:
    """A process that was killed, and ends when somebody waits for it."""

    pid = 4242

    def __init__(self) -> None:
        self.alive = True

    def wait(self, timeout: float | None) -> bool:
        self.alive = self.alive and timeout == 0
        return not self.alive

    def leave(self) -> None:
        pass


class KillingPager:
    """A pager that has killed that VM, since it lacked memory."""

    def close(self) -> list[str]:
        return [f"vm-{DyingProcess.pid}"]


def test_a_vm_that_the_pager_has_just_killed_does_not_live_on(folder: Path) -> None:
    private = Folder(None)
    api_sock = private.path / "api.sock"
    api_sock.touch()
    place = Place(api_sock, folder / "pager.sock", str(api_sock), "", "")
    restoration = Restoration(cast("Pager", KillingPager()), private, OutputReader())
    restoration.vms = (RestoredVm(1, cast("VmmProcess", DyingProcess()), Version(1, 17), place, 0.0),)
    restoration.release()
    assert not restoration.vm.lives_on
    assert not private.path.exists()


@pytest.fixture
def host(folder: Path) -> Path:
    """A folder of the host with files as the jailer makes them."""
    host = folder / "host"
    for name in ("dev/net/tun", "dev/kvm", "dev/urandom", "dev/userfaultfd", "run/firecracker.socket"):
        (host / name).parent.mkdir(parents=True, exist_ok=True)
        (host / name).write_text("precious")
    return host


@pytest.fixture
def root(folder: Path) -> Path:
    """A jail that was made ready."""
    root = folder / "jails" / "true" / "vm" / "root"
    root.mkdir(parents=True)
    return root


@pytest.fixture
def private() -> Iterator[Folder]:
    private = Folder(None)
    yield private
    private.remove()


def enter(root: Path, private: Folder, folder: Path) -> Jail:
    owner = Owner(os.geteuid(), os.getegid())
    jailer = Jailer(owner=owner, chroot_base=root.parents[2], id="vm")
    program = folder / "true"
    program.touch()
    return Jail(jailer, program, StateFile.open(write_state_file(folder / "vm.state")), private, 1, 1)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_is_removed_from_a_jail_is_never_reached_through_a_link(
    root: Path, host: Path, private: Folder, folder: Path
) -> None:
    before = files(host)
    jail = enter(root, private, folder)
    # The jail is its owner's by now, who runs what he likes.
    for name in ("dev", "run"):
        (root / name).symlink_to(host / name)
    vm = RestoredVm(1, cast("VmmProcess", DyingProcess()), Version(1, 17), jail.place, 0.0, _jail=jail)
    vm.process.wait(None)
    vm.leave()
    assert files(host) == before
    # What is not ours stays.
    assert files(root) == ["dev", "run"]


def test_what_the_jailer_made_is_removed_from_a_jail(root: Path, private: Folder, folder: Path) -> None:
    jail = enter(root, private, folder)
    for name in ("dev/net/tun", "dev/kvm", "dev/urandom", "run/firecracker.socket", "true", "true.pid", "disk.img"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    jail.remove()
    assert files(root) == ["disk.img"]


@pytest.mark.parametrize("name", ["dev", "run"])
def test_a_jail_with_a_link_where_folders_are_to_be_is_refused(
    root: Path, host: Path, private: Folder, folder: Path, name: str
) -> None:
    (root / name).symlink_to(host / name)
    with pytest.raises(FirecrackerError, match="is a link, no folder"):
        enter(root, private, folder)
    assert files(root) == [name]


def test_a_jail_with_an_api_socket_in_it_is_refused(root: Path, host: Path, private: Folder, folder: Path) -> None:
    (root / "run").mkdir()
    (root / "run/firecracker.socket").symlink_to(host / "run/firecracker.socket")
    with pytest.raises(FirecrackerError, match="a VM has been in it"):
        enter(root, private, folder)
