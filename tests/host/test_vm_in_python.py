"""A VM in this very process, through the Python API."""

import select
import threading

import pytest

from latepage import GuestError, LatepageError
from latepage.kvm import ConfigError, Job, Vm

MEMORY = 8 << 20
PAGES = (MEMORY - (2 << 20)) // 4096


def test_it_fills_verifies_dirties_and_discards() -> None:
    with Vm.create("vm-7", memory=MEMORY, vcpus=2, backing="shared") as vm:
        vm.run(Job("fill", seed=1))
        assert vm.wait().done == PAGES
        vm.run(Job("dirty", seed=2, pages=((10, 5), (700, 1)), order="random"))
        vm.wait()
        vm.discard(12, 2)
        vm.run(Job("verify", order="strided"))
        assert vm.wait().is_right
        assert vm.compare().is_right
        report = vm.report()
        assert (report.name, report.pages, report.status) == ("vm-7", PAGES, "running")
        assert report.contents == {None: 2, 1: PAGES - 6, 2: 4}
        assert report.first_instruction_ns is not None


def test_events_can_be_polled_for() -> None:
    with Vm.create(memory=MEMORY) as vm:
        vm.run(Job("touch"))
        kinds = []
        while "job_done" not in kinds:
            select.select([vm], [], [])
            event = vm.next_event(0)
            assert event is not None
            kinds.append(event["event"])
        assert kinds[0] == "first_instruction"
        assert vm.next_event(0) is None


def test_who_waits_for_a_vm_that_is_closed_is_told_so() -> None:
    vm = Vm.create(memory=MEMORY)
    vm.run(Job("count"))
    told: list[str] = []

    def wait() -> None:
        with pytest.raises(GuestError) as error:
            vm.wait()
        told.append(str(error.value))

    thread = threading.Thread(target=wait)
    thread.start()
    vm.close()
    thread.join()
    assert len(told) == 1
    with pytest.raises(GuestError, match="closed"):
        vm.report()


def test_impossible_vms_and_jobs_are_errors_of_ours_with_the_vm_named() -> None:
    with pytest.raises(ConfigError, match="multiple of 2 MiB") as odd:
        Vm.create("vm-odd", memory=5_000_000)
    assert isinstance(odd.value, LatepageError)
    assert odd.value.vm == "vm-odd"
    with pytest.raises(ConfigError, match="name one of the two"):
        Vm.restore("state")
    with pytest.raises(GuestError, match="none") as missing:
        Vm.restore("none", memory_file="none")
    assert missing.value.errno == 2
    with Vm.create(memory=MEMORY) as vm:
        with pytest.raises(GuestError, match="no job was ever run"):
            vm.wait()
        with pytest.raises(GuestError, match="among the VM's"):
            vm.run(Job("touch", pages=((PAGES, 1),)))
        vm.run(Job("count"))
        with pytest.raises(GuestError, match="busy"):
            vm.run(Job("touch"))


def test_threads_can_always_stand_in_and_say_so() -> None:
    with Vm.create(memory=MEMORY, guest="threads", vcpus=3) as vm:
        vm.run(Job("fill", seed=4, order="random"))
        assert vm.wait().is_right
        assert vm.compare().is_right
        assert vm.report().guest == "threads"
