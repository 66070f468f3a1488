"""The promises, with real VMs on `latepage serve`: contents, and that nobody is harmed by another's end."""

import fcntl
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from actors.memory_file import PAGE
from actors.serve import Serve
from latepage.kvm import Job, VmProcess
from latepage.kvm.vm import Backing, Handshake

pytestmark = pytest.mark.needs("/dev/userfaultfd")

MEMORY = 16 << 20
HUGE = Path("/proc/sys/vm/nr_hugepages")


@dataclass(frozen=True)
class Saved:
    """A VM that was filled and saved."""

    state: Path
    memory: Path


@pytest.fixture(scope="module", params=[1, 8], ids=["1-vcpu", "8-vcpus"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    files = Saved(folder / "vm.state", folder / "vm.mem")
    fill = Job("fill", seed=7)
    with VmProcess.create(fill, memory=MEMORY, vcpus=request.param, save=(files.state, files.memory)) as vm:
        vm.event("saved")
        assert vm.wait() == 0
    return files


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Enough pages of 2 MiB in the pool, for the time of a test. Whoever else changes the pool waits for its lock."""
    with HUGE.open() as pool:
        fcntl.flock(pool, fcntl.LOCK_EX)
        before = int(HUGE.read_text())
        try:
            HUGE.write_text(str(before + 2 * MEMORY // (2 << 20)))
        except OSError as error:
            pytest.skip(f"no pages of 2 MiB can be reserved: {error}")
        try:
            if int(HUGE.read_text()) < before + MEMORY // (2 << 20):
                pytest.skip("there are not enough pages of 2 MiB")
            yield
        finally:
            HUGE.write_text(str(before))


@dataclass(frozen=True)
class Way:
    """How a VM gets its memory."""

    backing: Backing
    handshake: Handshake
    send_memory: bool | None = None

    def __str__(self) -> str:
        install = "" if self.send_memory is None else "-continue" if self.send_memory else "-copy"
        return f"{self.handshake}-{self.backing}{install}"


WAYS = [
    Way("anonymous", "firecracker"),
    Way("anonymous", "latepage"),
    Way("private", "latepage", send_memory=False),
    Way("private", "latepage", send_memory=True),
    Way("shared", "latepage", send_memory=False),
    Way("shared", "latepage", send_memory=True),
    Way("hugetlb", "firecracker"),
    Way("hugetlb", "latepage"),
]


def verify(seed: int) -> Job:
    return Job("verify", order="random", seed=seed)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_contents_are_right_while_a_balloon_discards_and_population_runs(
    serve: Callable[..., Serve], folder: Path, saved: Saved, way: Way, request: pytest.FixtureRequest
) -> None:
    if way.backing == "hugetlb":
        request.getfixturevalue("huge_pages")
    pager = serve("--populate", "background", source=saved.memory)
    with VmProcess.restore(
        saved.state,
        pager=pager.socket,
        handshake=way.handshake,
        backing=way.backing,
        send_memory=way.send_memory,
        api_sock=folder / "vm.sock",
    ) as vm:
        pages = vm.event("started")["pages"]
        with vm.client() as client:
            client.run(verify(1))
            unit = 512 if way.backing == "hugetlb" else 8
            for first in range(0, pages - unit, 8 * unit):
                client.discard(first, unit)
            for seed in (2, 3):
                report = client.wait(60)
                assert report.is_right, report.wrong
                client.run(verify(seed))
                client.discard(seed * unit, unit)
            report = client.wait(60)
            assert report.is_right, report.wrong
            compared = client.compare()
            assert compared.is_right, compared.wrong
    assert pager.seen("failed") == []
    pager.event("ended")


def test_one_wrong_byte_in_the_memory_file_is_found_and_its_page_named(
    serve: Callable[..., Serve], folder: Path, saved: Saved
) -> None:
    wrong = folder / "wrong.mem"
    contents = bytearray(saved.memory.read_bytes())
    page = 1234
    contents[(2 << 20) + page * PAGE] ^= 1
    wrong.write_bytes(contents)
    pager = serve(source=wrong)
    with VmProcess.restore(saved.state, verify(1), pager=pager.socket, compare=True) as vm:
        report = vm.done()
        assert (report.wrong_pages, report.wrong) == (1, (page,))
        compared = vm.event("compared")
        assert (compared["wrong_pages"], compared["wrong"]) == (1, [page])
        assert vm.wait() == 1


def test_a_vm_that_is_killed_in_a_storm_of_faults_harms_nobody(serve: Callable[..., Serve], saved: Saved) -> None:
    pager = serve("--fault-around", "4KiB", source=saved.memory)

    def restored(name: str) -> VmProcess:
        return VmProcess.restore(saved.state, verify(4), pager=pager.socket, name=name, compare=True)

    with restored("survivor") as survivor:
        for count in range(4):
            with restored(f"victim-{count}") as victim:
                pager.event("session-started", vm=f"victim-{count}")
                victim.event("first_instruction")
                victim.process.send_signal(signal.SIGKILL)
                assert pager.event("ended", vm=f"victim-{count}")["reason"] == "gone"
        assert survivor.done().is_right
        assert survivor.event("compared")["wrong_pages"] == 0
        assert survivor.wait() == 0
    pager.event("ended", vm="survivor")


def test_fifty_vms_ten_at_a_time_leave_nothing_behind(serve: Callable[..., Serve], folder: Path) -> None:
    small = Saved(folder / "small.state", folder / "small.mem")
    with VmProcess.create(Job("fill", seed=7), memory=6 << 20, save=(small.state, small.memory)) as vm:
        vm.event("saved")
        assert vm.wait() == 0
    pager = serve("--populate", "background", source=small.memory)

    def ten(batch: int) -> None:
        with ExitStack() as stack:
            vms = [
                stack.enter_context(
                    VmProcess.restore(
                        small.state, verify(number), pager=pager.socket, backing="shared", name=f"vm-{batch}-{number}"
                    )
                )
                for number in range(10)
            ]
            for vm in vms:
                assert vm.done().is_right
                assert vm.wait() == 0
        for number in range(10):
            pager.event("ended", vm=f"vm-{batch}-{number}")

    ten(0)  # what is made once, such as an allocator's arenas, is there from now on
    before = sorted(pager.descriptors().values()), pager.threads(), pager.mappings()
    resident = pager.resident()
    for batch in range(1, 6):
        ten(batch)
    assert (sorted(pager.descriptors().values()), pager.threads(), pager.mappings()) == before
    assert before[2] == []
    assert pager.resident() < resident + (2 << 20), "less than one VM's memory is left of fifty"
