"""A userfaultfd by system calls alone, beside `bare_vm`: what a test finds with it is the kernel's."""

import ctypes
import fcntl
import mmap
import os
import select
import struct
from types import TracebackType
from typing import Self

from actors.bare_vm import PAGE, address_of

SYS_USERFAULTFD = 323
API, REGISTER, COPY, WRITEPROTECT = 0xC018_AA3F, 0xC020_AA00, 0xC028_AA03, 0xC018_AA06
MODE_MISSING, MODE_WP = 1, 2
PAGEFAULT = 0x12


class Userfaultfd:
    """Over one whole mapping."""

    def __init__(self, memory: mmap.mmap, mode: int = MODE_MISSING, features: int = 0) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = int(libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK))
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        self.start = address_of(memory)
        fcntl.ioctl(self.fd, API, struct.pack("<3Q", 0xAA, features, 0))
        fcntl.ioctl(self.fd, REGISTER, struct.pack("<4Q", self.start, len(memory), mode, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self.fd)

    def pending(self, timeout: float) -> bool:
        """Whether a fault is there to be read, within so many seconds."""
        return bool(select.select([self.fd], [], [], timeout)[0])

    def read_page(self) -> int:
        """The page of the next fault, which must be there."""
        message = os.read(self.fd, 32)
        event, _, address = struct.unpack_from("<B7xQQ", message)
        assert event == PAGEFAULT
        return int(address - self.start) // PAGE

    def copy(self, page: int, contents: bytes) -> None:
        source = ctypes.create_string_buffer(contents, PAGE)
        fcntl.ioctl(self.fd, COPY, struct.pack("<4Qq", self.start + page * PAGE, ctypes.addressof(source), PAGE, 0, 0))

    def write_protect(self, page: int, on: bool) -> None:
        fcntl.ioctl(self.fd, WRITEPROTECT, struct.pack("<3Q", self.start + page * PAGE, PAGE, int(on)))
