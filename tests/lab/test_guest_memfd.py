"""guest_memfd: what the kernel's own 6.12 does with it. Mapping it as guest memory came with 6.18."""

import errno
import fcntl
import mmap
import os
import struct

import pytest

from actors.bare_vm import CAP_GUEST_MEMFD, CREATE_GUEST_MEMFD, PAGE, BareVm


def create(vm: BareVm, flags: int) -> int:
    # Given bytes that may be changed, ioctl returns the call's own result.
    fd: int = fcntl.ioctl(vm.fd, CREATE_GUEST_MEMFD, bytearray(struct.pack("<8Q", PAGE, flags, *[0] * 6)))
    return fd


@pytest.mark.parametrize("flags", [1 << 0, 1 << 1, 1 << 2, 1 << 3], ids=["MMAP", "INIT_SHARED", "NO_DIRECT_MAP", "WRITE"])
def test_none_of_its_newer_flags_is_there(flags: int) -> None:
    with BareVm(1, protected=True) as vm:
        assert vm.has(CAP_GUEST_MEMFD) == 1
        with pytest.raises(OSError, match="Invalid argument"):
            create(vm, flags)


def test_it_cannot_be_mapped() -> None:
    with BareVm(1, protected=True) as vm:
        guest_memfd = create(vm, 0)
        with pytest.raises(OSError, match="No such device") as refused:
            mmap.mmap(guest_memfd, PAGE)
        assert refused.value.errno == errno.ENODEV
        os.close(guest_memfd)


def test_ordinary_vms_have_none() -> None:
    with BareVm(1) as vm:
        assert vm.has(CAP_GUEST_MEMFD) == 0
