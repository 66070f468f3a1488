"""What the tests with a real Firecracker share: the binary, the guest, and a snapshot to restore."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from actors.firecracker_vm import MIB, FirecrackerVm, Snapshot, find_program
from actors.serve import Serve
from latepage.firecracker import Version

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def firecracker() -> Path:
    """The Firecracker to test with, on a machine that can run it and serve it."""
    program, why = find_program("firecracker", "FIRECRACKER")
    if program is None:
        pytest.skip(why)
    said = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    version = Version.parse(said.split()[1])
    if version < Version(1, 12):
        pytest.skip(f"Firecracker {version} does not say when its API is there: these tests take 1.12 or later")
    for path in ("/dev/kvm", "/dev/userfaultfd"):
        if not os.access(path, os.R_OK | os.W_OK):
            pytest.skip(f"no access to {path}")
    return program


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest of `guest/`, built as `make guest` builds it."""
    for tool in ("make", "cc"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} to build the guest with")
    image = tmp_path_factory.mktemp("guest") / "guest.elf"
    subprocess.run(["make", "--silent", "guest", f"GUEST={image}"], cwd=ROOT, check=True)
    return image


@pytest.fixture(scope="session")
def snapshot(firecracker: Path, guest: Path, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A VM of 32 MiB that was booted, filled and saved while its guest slept. No test writes to its files."""
    folder = tmp_path_factory.mktemp("snapshot")
    with FirecrackerVm(firecracker, folder) as vm:
        vm.boot(guest, 32 * MIB)
        vm.save(folder / "vm.state", folder / "vm.mem")
        return Snapshot(folder / "vm.state", folder / "vm.mem", (30 * MIB) >> 12)


VmFactory = Callable[[], FirecrackerVm]


@pytest.fixture
def start_vm(firecracker: Path, folder: Path) -> Iterator[VmFactory]:
    """Starts a Firecracker without a VM in it yet; each is ended with the test."""
    numbers = count()
    with ExitStack() as stack:
        yield lambda: stack.enter_context(FirecrackerVm(firecracker, folder, f"vm-{next(numbers)}"))


PagerFactory = Callable[..., Serve]


@pytest.fixture
def start_pager(folder: Path) -> Iterator[PagerFactory]:
    """Starts `latepage serve` on a memory file, with flags, and waits until it listens."""
    numbers = count()
    with ExitStack() as stack:

        def start(memory: Path, *flags: str) -> Serve:
            pager = stack.enter_context(Serve(folder / f"pager-{next(numbers)}.sock", memory, *flags))
            pager.event("listening")
            return pager

        yield start
