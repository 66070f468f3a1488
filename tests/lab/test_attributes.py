"""Memory-fault exits by memory attributes: what an unmodified kernel with KVM_SW_PROTECTED_VM does."""

import errno
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.bare_vm import (
    BASE,
    CAP_MEMORY_ATTRIBUTES,
    EXECUTE,
    FLAG_PRIVATE,
    PAGE,
    PRIVATE,
    SET_ATTRIBUTES,
    WRITE,
    BareVm,
    Exit,
    Registers,
)

FAULT = errno.EFAULT, 39, FLAG_PRIVATE


def supply(vm: BareVm, exit_: Exit) -> None:
    vm.install(exit_.page)
    vm.set_attribute(exit_.page, 1, on=False)


def test_only_vms_of_that_type_have_attributes_and_ordinary_slots_will_do() -> None:
    with BareVm(1) as ordinary:
        assert ordinary.has(CAP_MEMORY_ATTRIBUTES) == 0
        with pytest.raises(OSError, match="Invalid argument"):
            ordinary.set_attribute(0, 1, on=True)
    with BareVm(1, protected=True) as vm:
        assert vm.has(CAP_MEMORY_ATTRIBUTES) == PRIVATE
        vm.set_attribute(0, 1, on=True)


def test_each_absent_page_exits_once_and_no_present_page_does() -> None:
    """4,096 pages, every other one absent; the guest then finds every dword right."""
    pages = 4096
    with BareVm(pages, protected=True) as vm:
        for page in range(0, pages, 2):
            vm.install(page)
            vm.set_attribute(page + 1, 1, on=True)
        vcpu = vm.start_check()
        exits = vcpu.run_to_the_end(lambda exit_: supply(vm, exit_))
        assert exits == [Exit(*FAULT, BASE + page * PAGE, PAGE) for page in range(1, pages, 2)]
        assert vcpu.registers().ecx == 0


def test_writing_and_executing_exit_too_and_are_not_told_apart() -> None:
    with BareVm(2, protected=True) as vm:
        vm.set_attribute(0, 2, on=True)
        write = vm.start(WRITE, Registers(eax=7, esi=BASE, edi=BASE + PAGE, edx=PAGE))
        assert write.run_to_the_end(lambda exit_: supply(vm, exit_)) == [Exit(*FAULT, BASE, PAGE)]
        assert vm.install_view[:8] == struct.pack("<I", 7) + struct.pack("<I", BASE ^ vm.seed)
        vm.install_view[PAGE] = 0xC3  # ret
        execute = vm.start(EXECUTE, Registers(esi=BASE + PAGE))
        exits = execute.run_to_the_end(lambda exit_: vm.set_attribute(exit_.page, 1, on=False))
        assert exits == [Exit(*FAULT, BASE + PAGE, PAGE)]


def test_an_attribute_that_is_set_again_takes_a_mapped_page_away_at_once() -> None:
    with BareVm(8, protected=True) as vm:
        assert vm.exits_of_touching(range(8)) == []
        vm.set_attribute(3, 1, on=True)
        assert vm.exits_of_touching(range(8)) == [3]
        vm.set_attribute(3, 1, on=False)
        assert vm.exits_of_touching(range(8)) == []


def test_an_attribute_of_a_whole_range_is_cleared_in_one_call() -> None:
    with BareVm(64, protected=True) as vm:
        vm.set_attribute(0, 64, on=True)
        vcpu = vm.start_check()

        def supply_sixteen(exit_: Exit) -> None:
            for page in range(exit_.page, exit_.page + 16):
                vm.install(page)
            vm.set_attribute(exit_.page, 16, on=False)

        assert [exit_.page for exit_ in vcpu.run_to_the_end(supply_sixteen)] == [0, 16, 32, 48]
        assert vcpu.registers().ecx == 0


def test_another_process_may_not_change_attributes() -> None:
    """KVM checks whose memory it is: the descriptor alone is no use."""
    attempt = f"import fcntl, sys; fcntl.ioctl(int(sys.argv[1]), {SET_ATTRIBUTES}, bytes.fromhex(sys.argv[2]))"
    with BareVm(1, protected=True) as vm:
        argument = struct.pack("<4Q", BASE, PAGE, PRIVATE, 0).hex()
        command = [sys.executable, "-c", attempt, str(vm.fd), argument]
        done = subprocess.run(command, pass_fds=[vm.fd], capture_output=True, text=True, timeout=120, check=False)
        assert done.stderr.splitlines()[-1] == f"OSError: [Errno {errno.EIO}] Input/output error"
        assert vm.exits_of_touching([0]) == []


def test_sixty_four_vcpus_exit_for_pages_of_their_own() -> None:
    each, vcpus = 16, 64
    with BareVm(each * vcpus, vcpus=vcpus, protected=True) as vm:
        vm.set_attribute(0, vm.pages, on=True)

        def walk(number: int) -> tuple[list[int], int]:
            vcpu = vm.start_check(number * each, each, vcpu=number)
            exits = vcpu.run_to_the_end(lambda exit_: supply(vm, exit_))
            return [exit_.page for exit_ in exits], vcpu.registers().ecx

        with ThreadPoolExecutor(vcpus) as threads:
            walks = list(threads.map(walk, range(vcpus)))
        assert walks == [(list(range(number * each, (number + 1) * each)), 0) for number in range(vcpus)]
