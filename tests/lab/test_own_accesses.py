"""KVM's own accesses: no exit reports them, they go through the guest view, and a userfaultfd there catches them.

Each test runs on every way to make a page absent that this kernel has.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.bare_userfaultfd import Userfaultfd
from actors.bare_vm import BASE, CLOCK, EXIT_HLT, EXIT_IO, EXIT_MEMORY_FAULT, PAGE, PORT_OUTPUT, BareVm, Registers

CLOCK_MSR = 0x4B56_4D01  # MSR_KVM_SYSTEM_TIME_NEW
TIMEOUT = 60


@pytest.fixture(params=["attributes", pytest.param("bitmap", marks=pytest.mark.needs_kernel("userfault"))])
def vm(request: pytest.FixtureRequest) -> Iterator[BareVm]:
    """A VM of four pages, all absent."""
    bitmap = request.param == "bitmap"
    with BareVm(4, protected=not bitmap, bitmap=bitmap) as vm:
        if bitmap:
            vm.set_bits(range(4))
        else:
            vm.set_attribute(0, 4, on=True)
        yield vm


def expose(vm: BareVm, page: int) -> None:
    if any(vm.bitmap[:]):
        vm.clear_bit(page)
    else:
        vm.set_attribute(page, 1, on=False)


def test_a_clock_page_in_absent_memory_is_caught_by_the_userfaultfd(vm: BareVm) -> None:
    """The guest names the page in an MSR, and KVM writes the time there; then the guest reads it."""
    with Userfaultfd(vm.guest_view) as uffd, ThreadPoolExecutor(1) as thread:
        vcpu = vm.start(CLOCK, Registers(eax=(BASE + PAGE) | 1, ecx=CLOCK_MSR, esi=BASE + PAGE))
        first = thread.submit(vcpu.run)
        assert uffd.pending(TIMEOUT)
        assert uffd.read_page() == 1
        assert not first.done()
        uffd.copy(1, bytes(PAGE))
        exit_ = first.result(TIMEOUT)
        # KVM has written, and the guest's own access still exits.
        assert (exit_.reason, exit_.page) == (EXIT_MEMORY_FAULT, 1)
        assert any(vm.install_view[PAGE : PAGE + 32])
        expose(vm, 1)
        assert thread.submit(vcpu.run).result(TIMEOUT).reason == EXIT_HLT
        version = vcpu.registers().ebx
        assert version
        assert version % 2 == 0
        assert not uffd.pending(0)


def test_without_a_userfaultfd_kvm_writes_its_clock_into_an_absent_page(vm: BareVm) -> None:
    """So exits alone are not enough: whatever is installed there later would overwrite the clock."""
    vcpu = vm.start(CLOCK, Registers(eax=(BASE + PAGE) | 1, ecx=CLOCK_MSR, esi=BASE + PAGE))
    exit_ = vcpu.run()
    assert (exit_.reason, exit_.page) == (EXIT_MEMORY_FAULT, 1)
    assert any(vm.install_view[PAGE : PAGE + 32])


def test_the_operand_of_an_emulated_instruction_is_caught_by_the_userfaultfd(vm: BareVm) -> None:
    """`outsb` is emulated, and KVM reads the byte to put out: no exit, and without a userfaultfd it would be zero."""
    with Userfaultfd(vm.guest_view) as uffd, ThreadPoolExecutor(1) as thread:
        vcpu = vm.start(PORT_OUTPUT, Registers(edx=0x3F8, esi=BASE + 2 * PAGE))
        first = thread.submit(vcpu.run)
        assert uffd.pending(TIMEOUT)
        assert uffd.read_page() == 2
        uffd.copy(2, b"\x5a" * PAGE)
        assert first.result(TIMEOUT).reason == EXIT_IO
        assert vcpu.io_data() == (0x3F8, b"\x5a")


def test_without_a_userfaultfd_the_operand_of_an_emulated_instruction_is_zero(vm: BareVm) -> None:
    vcpu = vm.start(PORT_OUTPUT, Registers(edx=0x3F8, esi=BASE + 2 * PAGE))
    assert vcpu.run().reason == EXIT_IO
    assert vcpu.io_data() == (0x3F8, b"\0")


def test_a_page_written_through_the_install_view_faults_no_more(vm: BareVm) -> None:
    """MISSING asks the page cache, and the install view has filled it: exit and userfaultfd live side by side."""
    with Userfaultfd(vm.guest_view) as uffd, ThreadPoolExecutor(1) as thread:
        vcpu = vm.start_check()
        exits = []
        while (exit_ := thread.submit(vcpu.run).result(TIMEOUT)).reason == EXIT_MEMORY_FAULT:
            exits.append(exit_.page)
            vm.install(exit_.page)
            expose(vm, exit_.page)
        assert exit_.reason == EXIT_HLT
        assert exits == [0, 1, 2, 3]
        assert vcpu.registers().ecx == 0
        assert not uffd.pending(0)
