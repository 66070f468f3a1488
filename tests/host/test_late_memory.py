"""Memory that the VMM itself brings when it is touched, on any kernel: by userfaultfd, and refusals of what a kernel lacks."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from latepage import GuestError
from latepage.check import check_host
from latepage.kvm import ConfigError, Job, Vm, VmProcess

MEMORY = 8 << 20
PAGES = (MEMORY - (2 << 20)) // 4096
HOLES = (100, 50)

Snapshot = tuple[Path, Path]
pytestmark = pytest.mark.needs("/dev/userfaultfd")


@pytest.fixture
def snapshot(folder: Path) -> Snapshot:
    """Pages of a seed, and fifty of zeros."""
    files = folder / "vm.state", folder / "vm.mem"
    with Vm.create(memory=MEMORY, split=True, vcpus=2, backing="shared") as vm:
        vm.run(Job("fill", seed=7))
        vm.wait()
        vm.discard(*HOLES)
        vm.save(*files)
    return files


def late(snapshot: Snapshot, **options: object) -> Vm:
    state, memory = snapshot
    return Vm.restore(state, memory_file=memory, late=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("guest", ["kvm", "threads"])
def test_each_page_comes_once_when_it_is_touched(snapshot: Snapshot, guest: str) -> None:
    if guest == "kvm" and check_host().items["kvm.vm"].state != "yes":
        pytest.skip("needs KVM")
    with late(snapshot, guest=guest) as vm:
        vm.run(Job("verify", order="random"))
        assert vm.wait().is_right
        report = vm.report().late
        assert report is not None
        assert (report.delivery, report.trap, report.exits, report.beside) == ("uffd", None, 0, 0)
        # The system area too, as far as it was touched: the programs and page tables, or the lists of a job.
        assert PAGES - HOLES[1] <= report.filled < PAGES
        assert HOLES[1] <= report.zero < MEMORY // 4096 - report.filled
        assert vm.compare().is_right
        assert vm.report().late != report
        everything = vm.report().late
        assert everything is not None
        assert everything.filled + everything.zero == MEMORY // 4096


def test_a_window_brings_neighbours(snapshot: Snapshot) -> None:
    with late(snapshot, window=64 << 10, guest="threads") as vm:
        assert vm.compare().is_right
        report = vm.report().late
        assert report is not None
        assert report.filled + report.zero == MEMORY // 4096
        assert report.faults == report.filled + report.zero - report.beside
        assert report.faults < MEMORY // 4096 // 10


def test_discarded_pages_are_zero_and_never_the_snapshots(snapshot: Snapshot) -> None:
    with late(snapshot) as vm:
        vm.run(Job("verify", pages=((0, 40),)))
        assert vm.wait().is_right
        # Some have been touched, some not; the range lies in both regions.
        middle = (MEMORY // 2 - (2 << 20)) // 4096
        vm.discard(20, 40)
        vm.discard(middle - 8, 16)
        vm.run(Job("verify", order="random"))
        assert vm.wait().is_right
        assert vm.compare().is_right


def test_a_late_vm_can_be_saved_and_restored(snapshot: Snapshot, folder: Path) -> None:
    again = folder / "again.state", folder / "again.mem"
    with late(snapshot) as vm:
        vm.run(Job("dirty", seed=9, pages=((3, 5),)))
        vm.wait()
        vm.save(*again)
    with late(again) as vm:
        vm.run(Job("verify"))
        assert vm.wait().is_right
        assert vm.compare().is_right


def test_exits_are_refused_where_the_kernel_has_none_and_the_message_says_what_lacks(snapshot: Snapshot) -> None:
    items = check_host().items
    if items["kvm.vm"].state != "yes":
        pytest.skip("needs KVM")
    for trap, key in (("bitmap", "kvm.exit_by_userfault"), ("attributes", "kvm.exit_by_attributes")):
        if items[key].state == "yes":
            continue
        why = rf"no memory-fault exits: by {trap}: KVM_.*--delivery uffd or --guest threads needs none"
        with pytest.raises(GuestError, match=why):
            late(snapshot, delivery="exit", trap=trap, guest="kvm")


def test_threads_whose_accesses_come_back_die_of_a_page_that_cannot_be_had_with_a_word(snapshot: Snapshot, folder: Path) -> None:
    options = {"delivery": "exit", "guest": "threads", "paused": True, "api_sock": folder / "vm.sock"}
    state, memory = snapshot
    with VmProcess.restore(state, Job("touch"), late=memory, **options) as vm:  # type: ignore[arg-type]
        vm.event("started")
        os.truncate(memory, MEMORY // 2)
        # It may die before it answers.
        with vm.client() as client, contextlib.suppress(GuestError):
            client.resume()
        with pytest.raises(GuestError, match=r"the memory at host address 0x[0-9a-f]+ could not be had: memory file "):
            vm.done()
        assert vm.process.returncode == -signal.SIGBUS


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"delivery": "exit", "trap": "bitmap", "guest": "threads"}, "goes with a guest on KVM"),
        ({"trap": "bitmap"}, "goes with the delivery exit"),
        ({"backing": "anonymous"}, "it cannot be anonymous"),
        ({"window": 5000}, "multiple of 4096"),
        ({"map_memory": True}, "not mapped"),
    ],
)
def test_what_cannot_be_is_refused(snapshot: Snapshot, options: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        late(snapshot, **options)


def test_a_memory_file_of_another_vm_is_refused(snapshot: Snapshot, folder: Path) -> None:
    other = folder / "other.mem"
    other.write_bytes(bytes(4096))
    with pytest.raises(GuestError, match="it is not this VM's snapshot"):
        late((snapshot[0], other))
