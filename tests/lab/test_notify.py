"""The delivery `notify` in the reference VMM: vCPUs post their memory-fault exits to a pager in another process, by each trap.

Counts are exact: one exit for each absent page that a vCPU touches, none for one that is there.
"""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from latepage import CallbackSource, GuestError, Pager, Policy
from latepage.kvm import Job, NotifyReport, Trap, Vm

MEMORY = 6 << 20
PAGES = (MEMORY - (2 << 20)) // 4096
HOLES = 100, 64

Snapshot = tuple[Path, Path]
Restore = Callable[..., Vm]


@pytest.fixture(params=["attributes", pytest.param("bitmap", marks=pytest.mark.needs_kernel("userfault"))])
def trap(request: pytest.FixtureRequest) -> Trap:
    kind: Trap = request.param
    return kind


@pytest.fixture(params=[False, True], ids=["notify", "all"])
def all_posted(request: pytest.FixtureRequest) -> bool:
    """Whether what comes by userfaultfd is posted too, and the pager has none."""
    posted: bool = request.param
    return posted


def saved(folder: Path, vcpus: int) -> Snapshot:
    files = folder / f"{vcpus}.state", folder / f"{vcpus}.mem"
    with Vm.create("vm-7", memory=MEMORY, split=True, vcpus=vcpus, backing="shared", guest="kvm") as vm:
        vm.run(Job("fill", seed=7))
        vm.wait()
        vm.discard(*HOLES)
        vm.save(*files)
    return files


PAGER = """
import sys
from latepage import Pager, Policy, open_source
with Pager() as pager:
    pager.listen(sys.argv[1], open_source(sys.argv[2]), Policy(fault_around=int(sys.argv[3])))
    print(flush=True)
    sys.stdin.read()
"""


class OtherProcess:
    """A pager in a process of its own: with everything emulated, `latepage serve` takes its time to start."""

    def __init__(self, socket: Path, memory: Path, fault_around: int) -> None:
        command = [sys.executable, "-c", PAGER, str(socket), str(memory), str(fault_around)]
        self.socket = socket
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.child.stdout is not None
        assert self.child.stdout.readline() == b"\n", "the pager did not start; see its standard error"

    def kill(self) -> None:
        self.child.kill()
        self.child.communicate()


@pytest.fixture(scope="module")
def snapshots() -> Iterator[Callable[[int], Snapshot]]:
    """Of VMs of two regions with so many vCPUs, pages of a seed and some of zeros; each is made once."""
    with tempfile.TemporaryDirectory(prefix="latepage-") as name:

        @functools.cache
        def made(vcpus: int) -> Snapshot:
            return saved(Path(name), vcpus)

        yield made


@pytest.fixture
def pager(folder: Path) -> Iterator[Callable[..., OtherProcess]]:
    with ExitStack() as stack:

        def start(memory: Path, fault_around: int = 4096) -> OtherProcess:
            started = OtherProcess(folder / "pager.sock", memory, fault_around)
            stack.callback(started.kill)
            return started

        yield start


@pytest.fixture
def restored(snapshots: Callable[[int], Snapshot], pager: Callable[..., OtherProcess], trap: Trap, all_posted: bool) -> Restore:
    """Restores a VM; a pager in another process has its memory."""

    def restore(vcpus: int = 2, fault_around: int = 4096) -> Vm:
        state, memory = snapshots(vcpus)
        socket = pager(memory, fault_around).socket
        return Vm.restore(state, pager=socket, delivery="notify", trap=trap, notify_all=all_posted, guest="kvm")

    return restore


def told(vm: Vm) -> NotifyReport:
    report = vm.report().notify
    assert report is not None
    return report


def test_every_absent_page_that_the_guest_touches_exits_once(restored: Restore, trap: Trap, all_posted: bool) -> None:
    with restored() as vm:
        vm.run(Job("verify", order="random", seed=3))
        assert vm.wait().is_right
        first = told(vm)
        assert (first.delivery, first.trap, first.all) == ("notify", trap, all_posted)
        # The guest's page tables and programs exit too.
        assert 0 < first.exits - PAGES < 16
        assert first.posted - first.forwarded == first.exits
        # All is there: nothing exits any more.
        vm.run(Job("verify", order="strided"))
        assert vm.wait().is_right
        assert told(vm).exits == first.exits
        assert vm.compare().is_right
        assert told(vm).exits == first.exits
        # Whom the pager has no userfaultfd of, the VMM posts for.
        assert (told(vm).forwarded > 0) == all_posted


def test_pages_that_came_unasked_exit_less(restored: Restore, trap: Trap) -> None:
    with restored(fault_around=64 << 10) as vm:
        vm.run(Job("verify"))
        assert vm.wait().is_right
        # Two vCPUs may want a page of the same sixteen at the same time, and one of them exits for nothing.
        assert told(vm).exits < PAGES // 8
        assert vm.compare().is_right


def test_discarded_pages_exit_once_more_and_are_zero(restored: Restore) -> None:
    with restored() as vm:
        vm.run(Job("verify"))
        assert vm.wait().is_right
        before = told(vm)
        middle = (MEMORY // 2 - (2 << 20)) // 4096
        vm.discard(middle - 8, 16)
        vm.run(Job("touch"))
        vm.wait()
        vm.run(Job("touch"))
        vm.wait()
        after = told(vm)
        assert (after.exits - before.exits, after.removed - before.removed) == (16, 1)
        vm.run(Job("verify"))
        assert vm.wait().is_right
        assert vm.compare().is_right


@pytest.mark.parametrize("vcpus", [8, 64])
def test_many_vcpus_post_at_once(restored: Restore, vcpus: int) -> None:
    with restored(vcpus) as vm:
        vm.run(Job("verify", order="random"))
        assert vm.wait().is_right
        # Many want the same few of the system's pages.
        assert PAGES < told(vm).exits < PAGES + 16 * vcpus
        assert vm.compare().is_right


def test_kvms_clock_in_an_absent_page_is_written_into_the_snapshots_contents(restored: Restore, all_posted: bool) -> None:
    """KVM's own write is no exit: it waits at the userfaultfd until the page is filled, and changes what that held."""
    page = 200
    # No word of a fingerprint lies there: the guest finds its page right, and who compares every byte finds the clock.
    gpa = (2 << 20) + page * 4096 + 3920
    with restored() as vm:
        vm.run(Job("touch", pages=((0, 1),)))
        vm.wait()
        before = told(vm)
        vm.clock(gpa)
        # Whatever the vCPU does, KVM writes first.
        vm.run(Job("touch", pages=((0, 1),)))
        vm.wait()
        after = told(vm)
        assert (after.exits, after.forwarded) == (before.exits, before.forwarded + int(all_posted))
        vm.run(Job("verify"))
        assert vm.wait().is_right
        assert vm.compare().wrong == (page,)


def test_the_operand_of_a_string_instruction_is_brought_for_kvm_itself(restored: Restore, all_posted: bool) -> None:
    with restored() as vm:
        # In both regions: KVM reads their page tables, too, to find the operand.
        vm.run(Job("say", pages=((0, 4), (PAGES - 4, 4))))
        assert vm.wait().is_right
        before = told(vm)
        vm.run(Job("say"))
        assert vm.wait().is_right
        after = told(vm)
        assert after.exits == before.exits
        assert after.forwarded - before.forwarded == (PAGES - 8 if all_posted else 0)


def test_a_vcpu_that_waits_for_a_page_can_be_paused_and_goes_on(
    snapshots: Callable[[int], Snapshot], pager: Callable[..., OtherProcess], trap: Trap, all_posted: bool
) -> None:
    """Its pager has gone: it waits in the channel, and comes out of there to be paused."""
    state, memory = snapshots(2)
    other = pager(memory)
    with Vm.restore(state, pager=other.socket, delivery="notify", trap=trap, notify_all=all_posted, guest="kvm") as vm:
        vm.run(Job("touch", pages=((0, 4),)))
        vm.wait()
        before = told(vm)
        other.kill()
        vm.run(Job("touch", pages=((8, 4),)))
        while told(vm).posted < before.posted + 2:
            pass
        for _ in range(3):
            vm.pause()
            assert vm.report().status == "paused"
            vm.resume()
        # They wait for the same pages, and have not asked again.
        assert told(vm).posted == before.posted + 2


def test_the_next_pager_serves_what_vcpus_and_kvm_wait_for(
    snapshots: Callable[[int], Snapshot], pager: Callable[..., OtherProcess], trap: Trap, all_posted: bool
) -> None:
    state, memory = snapshots(2)
    page = 200
    other = pager(memory, 64 << 10)
    with Vm.restore(state, pager=other.socket, delivery="notify", trap=trap, notify_all=all_posted, guest="kvm") as vm:
        # With each of them fifteen come, which are the guest's own from now on.
        vm.run(Job("dirty", seed=9, pages=((0, 64),)))
        vm.wait()
        before = told(vm)
        other.kill()
        vm.clock((2 << 20) + page * 4096 + 3920)
        vm.run(Job("touch"))
        while told(vm).posted == before.posted:
            pass
        pager(memory, 64 << 10)
        vm.wait()
        vm.run(Job("verify", order="random"))
        assert vm.wait().is_right
        assert vm.compare().wrong == (page,)
        assert told(vm).connected == 2


def test_a_page_that_cannot_be_had_fails_the_vm_and_is_never_zero(
    snapshots: Callable[[int], Snapshot], folder: Path, trap: Trap, all_posted: bool
) -> None:
    state, memory = snapshots(2)
    contents = memory.read_bytes()
    broken = (2 << 20) + 50 * 4096

    def supply(offset: int, length: int) -> bytes:
        if offset <= broken < offset + length:
            raise OSError("it is lost")
        return contents[offset : offset + length]

    source = CallbackSource(supply, size=len(contents), batch=4096)
    way = {"pager": folder / "pager.sock", "delivery": "notify", "notify_all": all_posted, "trap": trap}
    with Pager() as pager:
        pager.listen(folder / "pager.sock", source, Policy(on_missing="poison", fault_around=4096))
        with Vm.restore(state, guest="kvm", **way) as vm:  # type: ignore[arg-type]
            vm.run(Job("touch"))
            with pytest.raises(GuestError, match=f"guest address {broken:#x} could not be had: its pager cannot supply it"):
                vm.wait()


@pytest.mark.needs_kernel("stock")
def test_a_kernel_without_the_bitmap_says_so_before_a_pager_is_asked(snapshots: Callable[[int], Snapshot], folder: Path) -> None:
    state, _ = snapshots(2)
    with pytest.raises(GuestError, match=r"by bitmap: KVM_SET_USER_MEMORY_REGION2 \(KVM_MEM_USERFAULT\): .*--delivery uffd"):
        Vm.restore(state, pager=folder / "nobody", delivery="notify", trap="bitmap", guest="kvm")
