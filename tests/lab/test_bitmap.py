"""Memory-fault exits by userfault bitmap: what a kernel with KVM_MEM_USERFAULT does, and how others refuse."""

import ctypes
import errno
import fcntl
import mmap
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actors.bare_vm import (
    BASE,
    CAP_USERFAULT,
    EXECUTE,
    EXIT_HLT,
    EXIT_UNKNOWN,
    FLAG_USERFAULT,
    MEM_LOG_DIRTY,
    MEM_USERFAULT,
    PAGE,
    SET_MEMORY,
    WRITE,
    BareVm,
    Exit,
    Registers,
    address_of,
)
from actors.huge_pages import huge_pages

FAULT = errno.EFAULT, 39, FLAG_USERFAULT
PROT_NONE = 0
userfault = pytest.mark.needs_kernel("userfault")


def supply(vm: BareVm, exit_: Exit) -> None:
    vm.install(exit_.page)
    vm.clear_bit(exit_.page)


@pytest.mark.needs_kernel("stock")
def test_a_kernel_without_it_refuses_the_flag() -> None:
    with BareVm(1) as vm:
        assert vm.has(CAP_USERFAULT) == 0
        with pytest.raises(OSError, match="Invalid argument"):
            vm.set_userfault(True)


@userfault
def test_the_flag_is_found_by_trying_it() -> None:
    with BareVm(1) as vm:
        assert vm.has(CAP_USERFAULT) == 1
        vm.set_userfault(True)
        vm.set_userfault(False)


@userfault
@pytest.mark.parametrize("protected", [False, True])
def test_each_absent_page_exits_once_and_no_present_page_does(protected: bool) -> None:
    """4,096 pages, every other one absent; the guest then finds every dword right."""
    pages = 4096
    with BareVm(pages, bitmap=True, protected=protected) as vm:
        for page in range(0, pages, 2):
            vm.install(page)
        vm.set_bits(range(1, pages, 2))
        vcpu = vm.start_check()
        exits = vcpu.run_to_the_end(lambda exit_: supply(vm, exit_))
        assert exits == [Exit(*FAULT, BASE + page * PAGE, PAGE) for page in range(1, pages, 2)]
        assert vcpu.registers().ecx == 0
        assert not any(vm.bitmap[:])


@userfault
def test_writing_and_executing_exit_too_and_are_not_told_apart() -> None:
    with BareVm(2, bitmap=True) as vm:
        vm.set_bits([0, 1])
        write = vm.start(WRITE, Registers(eax=7, esi=BASE, edi=BASE + PAGE, edx=PAGE))
        assert write.run_to_the_end(lambda exit_: supply(vm, exit_)) == [Exit(*FAULT, BASE, PAGE)]
        assert vm.install_view[:8] == struct.pack("<I", 7) + struct.pack("<I", BASE ^ vm.seed)
        vm.install_view[PAGE] = 0xC3  # ret
        execute = vm.start(EXECUTE, Registers(esi=BASE + PAGE))
        assert execute.run_to_the_end(lambda exit_: vm.clear_bit(exit_.page)) == [Exit(*FAULT, BASE + PAGE, PAGE)]


@userfault
def test_a_bit_that_stays_set_comes_back_every_time() -> None:
    with BareVm(1, bitmap=True) as vm:
        vm.set_bits([0])
        vcpu = vm.start_check()
        assert [vcpu.run() for _ in range(3)] == [Exit(*FAULT, BASE, PAGE)] * 3


@userfault
def test_another_process_installs_pages_and_clears_their_bits_through_mappings_of_its_own() -> None:
    """All it needs are two memfds: no ioctl, and nothing of the VM's process but a word that a page is wanted."""
    pages = 256
    program = Path(__file__).parents[1] / "actors" / "bitmap_clearer.py"
    with BareVm(pages, bitmap=True) as vm:
        vm.set_bits(range(pages))
        arguments = [str(vm.memory), str(vm.bitmap_file), str(BASE), str(vm.seed)]
        with subprocess.Popen(
            [sys.executable, program, *arguments],
            pass_fds=[vm.memory, vm.bitmap_file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdin is not None
            assert other.stdout is not None
            wanted, cleared = other.stdin, other.stdout

            def ask(exit_: Exit) -> None:
                print(exit_.page, file=wanted, flush=True)
                assert cleared.readline() == f"{exit_.page}\n"

            vcpu = vm.start_check()
            exits = vcpu.run_to_the_end(ask)
            wanted.close()
        assert [exit_.page for exit_ in exits] == list(range(pages))
        assert vcpu.registers().ecx == 0
        assert not any(vm.bitmap[:])


@userfault
def test_sixty_four_vcpus_exit_for_pages_of_their_own() -> None:
    # Eight pages at least: the clearing of a bit here is no atomic operation, and no two threads may share a byte.
    each, vcpus = 16, 64
    with BareVm(each * vcpus, vcpus=vcpus, bitmap=True) as vm:
        vm.set_bits(range(vm.pages))

        def walk(number: int) -> tuple[list[int], int]:
            vcpu = vm.start_check(number * each, each, vcpu=number)
            exits = vcpu.run_to_the_end(lambda exit_: supply(vm, exit_))
            return [exit_.page for exit_ in exits], vcpu.registers().ecx

        with ThreadPoolExecutor(vcpus) as threads:
            walks = list(threads.map(walk, range(vcpus)))
        assert walks == [(list(range(number * each, (number + 1) * each)), 0) for number in range(vcpus)]


@userfault
def test_a_huge_page_is_mapped_by_small_pages_while_the_flag_is_on_and_whole_afterwards() -> None:
    """The first page's bit is clear; were it mapped by 2 MiB, its neighbours would be exposed with it."""
    size = 2 << 20
    with huge_pages(1), BareVm(size // PAGE, bitmap=True) as vm:
        huge = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)  # MAP_HUGETLB
        huge[0] = 1
        vm.set_bits(range(1, 512))
        gpa = BASE + (1 << 30)
        vm.set_slot(number=2, flags=MEM_USERFAULT, gpa=gpa, size=size, address=address_of(huge), bitmap=address_of(vm.bitmap))
        first = (gpa - BASE) // PAGE
        pages = range(first, first + 512)
        assert vm.exits_of_touching(pages) == list(pages[1:])
        assert vm.statistic("pages_2m") == 0
        vm.set_slot(number=2, flags=0, gpa=gpa, size=size, address=address_of(huge))
        assert vm.exits_of_touching(pages) == []
        assert vm.statistic("pages_2m") == 1


@userfault
def test_dirty_logging_comes_and_goes_beside_it() -> None:
    pages = range(64)
    with BareVm(len(pages), bitmap=True) as vm:
        views = {"address": address_of(vm.guest_view), "bitmap": address_of(vm.bitmap)}
        vm.set_bits(pages[32:])
        for flags in (MEM_USERFAULT, MEM_USERFAULT | MEM_LOG_DIRTY, MEM_USERFAULT):
            vm.set_slot(flags=flags, **views)
            assert vm.exits_of_touching(pages) == list(pages[32:])
        for flags in (MEM_LOG_DIRTY, 0):
            vm.set_slot(flags=flags, **views)
            assert vm.exits_of_touching(pages) == []
        vm.set_slot(flags=MEM_USERFAULT | MEM_LOG_DIRTY, **views)
        assert vm.exits_of_touching(pages) == list(pages[32:])


def close_to_all(bitmap: mmap.mmap) -> None:
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address_of(bitmap)), ctypes.c_size_t(PAGE), PROT_NONE) == 0


@userfault
@pytest.mark.parametrize("make_unreadable", [close_to_all, mmap.mmap.close], ids=["protected", "unmapped"])
def test_a_bitmap_that_cannot_be_read_is_a_bare_efault(make_unreadable: Callable[[mmap.mmap], None]) -> None:
    """No exit reason, no address: not to be taken for a fault that could be resolved."""
    with BareVm(1) as vm:
        bitmap = mmap.mmap(vm.bitmap_file, PAGE)
        vm.set_slot(flags=MEM_USERFAULT, address=address_of(vm.guest_view), bitmap=address_of(bitmap))
        make_unreadable(bitmap)
        vcpu = vm.start_check(step=PAGE)
        assert [vcpu.run() for _ in range(2)] == [Exit(errno.EFAULT, EXIT_UNKNOWN)] * 2
        vm.set_userfault(False)
        assert vcpu.run().reason == EXIT_HLT


@userfault
def test_a_bitmap_that_cannot_be_one_is_refused() -> None:
    with BareVm(64) as vm:
        there = address_of(vm.bitmap)
        for wrong in (there + 4, 1 << 63, (1 << 64) - 4096):
            with pytest.raises(OSError, match="Invalid argument"):
                vm.set_slot(flags=MEM_USERFAULT, address=address_of(vm.guest_view), bitmap=wrong)
        vm.set_userfault(True)
        with pytest.raises(OSError, match="Invalid argument"):
            vm.set_slot(flags=MEM_USERFAULT, address=address_of(vm.guest_view), bitmap=there + 8)
        # The older call knows no bitmap.
        older = struct.pack("<IIQQQ", 0, MEM_USERFAULT, BASE, 64 * PAGE, address_of(vm.guest_view))
        with pytest.raises(OSError, match="Invalid argument"):
            fcntl.ioctl(vm.fd, SET_MEMORY, older)
