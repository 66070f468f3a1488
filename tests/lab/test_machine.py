"""What the lab's kernels must have for this project: nested paging, and every kernel interface that latepage uses."""

import ctypes
import errno
import os
from pathlib import Path

from actors.bare_userfaultfd import Userfaultfd
from actors.bare_vm import BareVm
from actors.huge_pages import huge_pages


def test_guests_run_on_nested_paging() -> None:
    """With shadow paging KVM would look at the guest's own page tables too, and counts would not be exact."""
    assert Path("/sys/module/kvm_amd/parameters/npt").read_text() == "Y\n"


def test_a_userfaultfd_has_every_feature_to_linux_6_8() -> None:
    features = (1 << 17) - 1
    events = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6  # nobody would read them here
    with BareVm(1) as vm, Userfaultfd(vm.guest_view, features=features & ~events):
        pass
    assert os.access("/dev/userfaultfd", os.R_OK | os.W_OK)


def test_io_uring_and_huge_pages_are_there() -> None:
    # Asked for no entries at all it says EINVAL, and without io_uring ENOSYS.
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(425, 0, ctypes.create_string_buffer(120)) == -1
    assert ctypes.get_errno() == errno.EINVAL
    with huge_pages(1):
        pass
