"""The delivery `exit` in the reference VMM: vCPUs' own threads bring absent pages, by each trap that this kernel has.

Counts are exact: one exit for each absent page that a vCPU touches, none for one that is there.
"""

import os
from pathlib import Path

import pytest

from latepage import GuestError
from latepage.kvm import Job, LateReport, Trap, Vm

MEMORY = 6 << 20
PAGES = (MEMORY - (2 << 20)) // 4096
ALL = MEMORY // 4096
HOLES = 100, 64

Snapshot = tuple[Path, Path]


@pytest.fixture(params=["attributes", pytest.param("bitmap", marks=pytest.mark.needs_kernel("userfault"))])
def trap(request: pytest.FixtureRequest) -> Trap:
    kind: Trap = request.param
    return kind


def saved(folder: Path, vcpus: int) -> Snapshot:
    files = folder / "vm.state", folder / "vm.mem"
    with Vm.create("vm-7", memory=MEMORY, split=True, vcpus=vcpus, backing="shared", guest="kvm") as vm:
        vm.run(Job("fill", seed=7))
        vm.wait()
        vm.discard(*HOLES)
        vm.save(*files)
    return files


@pytest.fixture
def snapshot(folder: Path) -> Snapshot:
    """Two regions, two vCPUs, pages of a seed and some of zeros."""
    return saved(folder, 2)


def restored(snapshot: Snapshot, trap: Trap | None, window: int | None = None) -> Vm:
    state, memory = snapshot
    return Vm.restore(state, memory_file=memory, late=True, delivery="exit", trap=trap, window=window, guest="kvm")


def brought(vm: Vm) -> LateReport:
    report = vm.report().late
    assert report is not None
    return report


def fresh(report: LateReport) -> int:
    """Exits that brought a page: those for a page that another thread was bringing, or had just brought, do not count."""
    return report.exits - report.joined - report.present


def test_every_absent_page_that_the_guest_touches_exits_once(snapshot: Snapshot, trap: Trap) -> None:
    with restored(snapshot, trap) as vm:
        vm.run(Job("verify", order="random", seed=3))
        assert vm.wait().is_right
        first = brought(vm)
        assert (first.delivery, first.trap) == ("exit", trap)
        # The guest's page tables and programs exit too.
        assert 0 < fresh(first) - PAGES < 12
        assert first.filled + first.zero == fresh(first) + first.faults
        # All is there: nothing exits any more.
        vm.run(Job("verify", order="strided"))
        assert vm.wait().is_right
        assert brought(vm).exits == first.exits
        assert vm.compare().is_right
        assert brought(vm).filled + brought(vm).zero == ALL
        assert brought(vm).exits == first.exits


def test_the_best_trap_of_this_kernel_is_found(snapshot: Snapshot) -> None:
    with restored(snapshot, None) as vm:
        assert brought(vm).trap == ("bitmap" if os.environ["LATEPAGE_LAB"] == "userfault" else "attributes")


@pytest.mark.needs_kernel("stock")
def test_a_kernel_without_the_bitmap_says_so(snapshot: Snapshot) -> None:
    with pytest.raises(GuestError, match=r"by bitmap: KVM_SET_USER_MEMORY_REGION2 \(KVM_MEM_USERFAULT\): Invalid argument"):
        restored(snapshot, "bitmap")


def test_a_window_comes_with_one_exit(snapshot: Snapshot, trap: Trap) -> None:
    with restored(snapshot, trap, window=64 << 10) as vm:
        vm.run(Job("touch", pages=((256, 256),)))
        vm.wait()
        before = brought(vm)
        vm.run(Job("verify", pages=((256, 256),)))
        assert vm.wait().is_right
        # A list and its table of seeds were written by the VMM, through the guest view.
        after = brought(vm)
        assert after.exits - before.exits <= 2
        assert before.beside >= 15 * 16
        assert vm.compare().is_right


def test_discarded_pages_exit_once_more_and_are_zero(snapshot: Snapshot, trap: Trap) -> None:
    """A discard sets their bits, or attributes, again, and takes them out of the guest view: so these count."""
    with restored(snapshot, trap) as vm:
        vm.run(Job("verify"))
        assert vm.wait().is_right
        before = brought(vm)
        middle = (MEMORY // 2 - (2 << 20)) // 4096
        vm.discard(middle - 8, 16)
        vm.run(Job("touch"))
        vm.wait()
        vm.run(Job("touch"))
        vm.wait()
        after = brought(vm)
        assert (after.exits - before.exits, after.zero - before.zero, after.filled) == (16, 16, before.filled)
        vm.run(Job("verify"))
        assert vm.wait().is_right
        assert vm.compare().is_right


@pytest.mark.parametrize("vcpus", [8, 64])
def test_many_vcpus_resolve_their_exits_at_once(folder: Path, trap: Trap, vcpus: int) -> None:
    with restored(saved(folder, vcpus), trap) as vm:
        vm.run(Job("verify", order="random"))
        assert vm.wait().is_right
        report = brought(vm)
        assert report.filled + report.zero == fresh(report) + report.faults
        assert PAGES < fresh(report) < PAGES + 12
        assert vm.compare().is_right
        assert brought(vm).filled + brought(vm).zero == ALL


def test_a_vm_whose_memory_file_was_cut_ends_and_never_reads_zero(snapshot: Snapshot, trap: Trap) -> None:
    # The file's lease holds writers back for so many seconds.
    Path("/proc/sys/fs/lease-break-time").write_text("1")
    with restored(snapshot, trap) as vm:
        vm.run(Job("verify", pages=((0, 8),)))
        assert vm.wait().is_right
        os.truncate(snapshot[1], 3 << 20)
        vm.run(Job("touch"))
        with pytest.raises(GuestError, match="could not be had"):
            vm.wait()


def test_kvms_clock_in_an_absent_page_is_written_into_the_snapshots_contents(snapshot: Snapshot, trap: Trap) -> None:
    """KVM's own write is no exit: it waits at the userfaultfd until the page is filled, and changes what that held."""
    page = 200
    # No word of a fingerprint lies there: the guest finds its page right, and who compares every byte finds the clock.
    gpa = (2 << 20) + page * 4096 + 3920
    with restored(snapshot, trap) as vm:
        vm.run(Job("touch", pages=((0, 1),)))
        vm.wait()
        before = brought(vm)
        vm.clock(gpa)
        # Whatever the vCPU does, KVM writes first.
        vm.run(Job("touch", pages=((0, 1),)))
        vm.wait()
        after = brought(vm)
        assert (after.exits, after.faults, after.filled) == (before.exits, before.faults + 1, before.filled + 1)
        vm.run(Job("touch", pages=((page, 1),)))
        vm.wait()
        assert brought(vm) == after
        vm.run(Job("verify"))
        assert vm.wait().is_right
        assert vm.compare().wrong == (page,)


def test_the_operand_of_a_string_instruction_is_brought_for_kvm_itself(snapshot: Snapshot, trap: Trap) -> None:
    with restored(snapshot, trap) as vm:
        # In both regions: KVM reads their page tables, too, to find the operand.
        vm.run(Job("say", pages=((0, 4), (PAGES - 4, 4))))
        assert vm.wait().is_right
        before = brought(vm)
        vm.run(Job("say"))
        assert vm.wait().is_right
        after = brought(vm)
        assert (after.faults - before.faults, after.exits - before.exits) == (PAGES - 8, 0)
        assert (after.filled - before.filled, after.zero - before.zero) == (PAGES - 8 - HOLES[1], HOLES[1])
        # KVM has read them; a vCPU has no exit there any more, nor where the VMM wrote the tables of this job.
        vm.run(Job("verify"))
        assert vm.wait().is_right
        assert fresh(brought(vm)) == fresh(after)
