"""Setting a bit again: it counts for what KVM has not mapped, so the page must be zapped. What zaps it, and what else that does.

Each way is tried on a page that the guest has touched, its bit set again; the neighbours' bits stay clear.
"""

import ctypes
import mmap
from collections.abc import Callable

import pytest

from actors.bare_userfaultfd import MODE_WP, Userfaultfd
from actors.bare_vm import PAGE, BareVm, address_of, page_contents

pytestmark = pytest.mark.needs_kernel("userfault")

PAGES, TAKEN = 16, 5
PROT_NONE = 0
PUNCH_HOLE, KEEP_SIZE = 2, 1
LIBC = ctypes.CDLL(None, use_errno=True)


def a_touched_vm() -> BareVm:
    vm = BareVm(PAGES, bitmap=True)
    for page in range(PAGES):
        vm.install(page)
    assert vm.exits_of_touching(range(PAGES)) == []
    return vm


def nothing(vm: BareVm) -> None:
    pass


def toggle_the_flag(vm: BareVm) -> None:
    vm.set_userfault(False)
    vm.set_userfault(True)


def discard_from_the_guest_view(vm: BareVm) -> None:
    vm.guest_view.madvise(mmap.MADV_DONTNEED, TAKEN * PAGE, PAGE)


def protect_and_allow_again(vm: BareVm) -> None:
    address = ctypes.c_void_p(address_of(vm.guest_view) + TAKEN * PAGE)
    for protection in (PROT_NONE, mmap.PROT_READ | mmap.PROT_WRITE):
        assert LIBC.mprotect(address, ctypes.c_size_t(PAGE), protection) == 0


def write_protect_by_userfaultfd(vm: BareVm) -> None:
    with Userfaultfd(vm.guest_view, MODE_WP, features=1 << 12) as uffd:  # WP_HUGETLBFS_SHMEM
        uffd.write_protect(TAKEN, True)
        uffd.write_protect(TAKEN, False)


def discard_from_the_install_view(vm: BareVm) -> None:
    vm.install_view.madvise(mmap.MADV_DONTNEED, TAKEN * PAGE, PAGE)


@pytest.mark.parametrize(
    ("way", "taken"),
    [
        (nothing, []),
        (discard_from_the_install_view, []),
        (toggle_the_flag, [TAKEN]),
        (discard_from_the_guest_view, [TAKEN]),
        (protect_and_allow_again, [TAKEN]),
        (write_protect_by_userfaultfd, [TAKEN]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_makes_a_bit_count_that_is_set_on_a_mapped_page(way: Callable[[BareVm], None], taken: list[int]) -> None:
    """None of these loses the contents of shared memory."""
    with a_touched_vm() as vm:
        vm.set_bits([TAKEN])
        way(vm)
        assert vm.exits_of_touching(range(PAGES)) == taken
        vm.clear_bit(TAKEN)
        vcpu = vm.start_check()
        assert vcpu.run_to_the_end(lambda _: None) == []
        assert vcpu.registers().ecx == 0


def test_the_holder_of_the_memory_file_takes_a_page_away_and_its_contents_too() -> None:
    """PUNCH_HOLE needs the file only, so that another process can do it: the page is away from every mapping."""
    with a_touched_vm() as vm:
        vm.set_bits([TAKEN])
        hole = ctypes.c_long(TAKEN * PAGE), ctypes.c_long(PAGE)
        assert LIBC.fallocate(vm.memory, PUNCH_HOLE | KEEP_SIZE, *hole) == 0
        assert vm.exits_of_touching(range(PAGES)) == [TAKEN]
        assert not any(vm.install_view[TAKEN * PAGE : (TAKEN + 1) * PAGE])
        assert vm.install_view[:PAGE] == page_contents(0, vm.seed)


def test_the_flag_takes_every_page_away_whose_bit_is_set_when_it_is_turned_on() -> None:
    with BareVm(PAGES) as vm:
        assert vm.exits_of_touching(range(PAGES)) == []
        vm.set_bits(range(PAGES))
        assert vm.exits_of_touching(range(PAGES)) == []
        vm.set_userfault(True)
        assert vm.exits_of_touching(range(PAGES)) == list(range(PAGES))
        vm.set_userfault(False)
        assert vm.exits_of_touching(range(PAGES)) == []
