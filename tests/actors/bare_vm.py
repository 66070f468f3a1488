"""A VM by ioctls alone: one slot of memory and guest programs of some ten instructions.

Nothing of latepage is in it, so that what a test finds with it is the kernel's. The guest runs in 32-bit protected mode
without paging: with nested paging below it, each page that its program touches is one look-up of KVM's, and no other.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

PAGE = 4096
BASE = 0x1000_0000
"""Guest-physical address of the slot's first page. The programs lie in a page of their own, at 0."""

# include/uapi/linux/kvm.h
GET_VCPU_MMAP_SIZE, CREATE_VM, CHECK_EXTENSION, CREATE_VCPU, RUN = 0xAE04, 0xAE01, 0xAE03, 0xAE41, 0xAE80
SET_MEMORY, SET_MEMORY2, SET_ATTRIBUTES, CREATE_GUEST_MEMFD = 0x4020_AE46, 0x40A0_AE49, 0x4020_AED2, 0xC040_AED4
GET_STATS = 0xAECE
GET_REGS, SET_REGS, GET_SREGS, SET_SREGS = 0x8090_AE81, 0x4090_AE82, 0x8138_AE83, 0x4138_AE84
SW_PROTECTED_VM = 1
CAP_MEMORY_ATTRIBUTES, CAP_GUEST_MEMFD, CAP_USERFAULT = 233, 234, 245  # the last is lab/kvm-userfault.patch's own
MEM_LOG_DIRTY, MEM_USERFAULT = 1 << 0, 1 << 3
PRIVATE = 1 << 3
EXIT_UNKNOWN, EXIT_IO, EXIT_HLT, EXIT_MEMORY_FAULT = 0, 2, 5, 39
FLAG_PRIVATE, FLAG_USERFAULT = 1 << 3, 1 << 4

# Each ends in hlt. esi: the first address, edi: the end, edx: the step, ebp: the seed of the contents.
CHECK = bytes.fromhex(
    "8b06"  # next: mov eax, [esi]
    "89f3 81e300f0ffff 31d8"  # xor eax, the page's own address
    "39e8 7401 41"  # if that is not the seed: inc ecx
    "01d6 39fe 72e9 f4"  # add esi, edx; while esi < edi: next; hlt
)
WRITE = bytes.fromhex("8906 01d6 39fe 72f8 f4")  # next: mov [esi], eax; add esi, edx; while esi < edi: next; hlt
EXECUTE = bytes.fromhex("ffd6 f4")  # call esi; hlt
PORT_OUTPUT = bytes.fromhex("6e f4")  # outsb from [esi] to port dx; hlt
CLOCK = bytes.fromhex("0f30 8b1e f4")  # wrmsr; mov ebx, [esi]; hlt


@dataclass(frozen=True)
class Exit:
    """How one KVM_RUN ended: its errno, the exit reason, and what a memory-fault exit says."""

    error: int
    reason: int
    flags: int = 0
    gpa: int = 0
    size: int = 0

    @property
    def page(self) -> int:
        return (self.gpa - BASE) // PAGE


@dataclass
class Registers:
    """What the programs use, by the order in `struct kvm_regs`."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0
    esi: int = 0
    edi: int = 0
    esp: int = PAGE
    ebp: int = 0


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def page_contents(page: int, seed: int) -> bytes:
    """What CHECK wants to find in a page."""
    return struct.pack("<I", (BASE + page * PAGE) ^ seed) * (PAGE // 4)


class Vcpu:
    """One vCPU, with a program to run."""

    def __init__(self, vm: "BareVm", number: int) -> None:
        self.fd = fcntl.ioctl(vm.fd, CREATE_VCPU, number)
        self.run_page = mmap.mmap(self.fd, fcntl.ioctl(vm.kvm, GET_VCPU_MMAP_SIZE))
        sregs = bytearray(312)
        fcntl.ioctl(self.fd, GET_SREGS, sregs)
        code = struct.pack("<QIH8B2x", 0, 0xFFFF_FFFF, 8, 0xB, 1, 0, 1, 1, 0, 1, 0)
        data = struct.pack("<QIH8B2x", 0, 0xFFFF_FFFF, 16, 0x3, 1, 0, 1, 1, 0, 1, 0)
        sregs[: 6 * 24] = code + data * 5
        struct.pack_into("<Q", sregs, 224, 0x11)  # cr0: protected mode, no paging
        fcntl.ioctl(self.fd, SET_SREGS, sregs)

    def start(self, program: int, registers: Registers) -> None:
        """Lets the next `run` begin `program`, an address in the page of programs."""
        general = [getattr(registers, name) for name in Registers.__dataclass_fields__]
        fcntl.ioctl(self.fd, SET_REGS, struct.pack("<18Q", *general, *[0] * 8, program, 2))

    def registers(self) -> Registers:
        regs = bytearray(144)
        fcntl.ioctl(self.fd, GET_REGS, regs)
        return Registers(*struct.unpack_from("<8Q", regs))

    def run(self) -> Exit:
        """One KVM_RUN."""
        error = 0
        try:
            fcntl.ioctl(self.fd, RUN, 0)
        except OSError as refused:
            error = refused.errno or 0
        (reason,) = struct.unpack_from("<I", self.run_page, 8)
        if reason != EXIT_MEMORY_FAULT:
            return Exit(error, reason)
        return Exit(error, reason, *struct.unpack_from("<3Q", self.run_page, 32))

    def run_to_the_end(self, resolve: Callable[[Exit], None]) -> list[Exit]:
        """Runs the program until its hlt and has every memory-fault exit resolved; returns those."""
        exits: list[Exit] = []
        while (exit_ := self.run()).reason != EXIT_HLT:
            if (exit_.error, exit_.reason) != (errno.EFAULT, EXIT_MEMORY_FAULT):
                raise AssertionError(f"after {len(exits)} memory-fault exits KVM_RUN ended with {exit_}")
            if exits[-1:] == [exit_]:
                raise AssertionError(f"it was resolved, and came back: {exit_}")
            exits.append(exit_)
            resolve(exit_)
        return exits

    def io_data(self) -> tuple[int, bytes]:
        """Port and data of the latest KVM_EXIT_IO."""
        _, size, port, count, offset = struct.unpack_from("<BBHIQ", self.run_page, 32)
        return port, self.run_page[offset : offset + size * count]


class BareVm:
    """Memory in a memfd, mapped twice: KVM has the guest view, the test writes through the install view."""

    def __init__(self, pages: int, *, vcpus: int = 1, protected: bool = False, bitmap: bool = False, seed: int = 0x5EED) -> None:
        self.pages, self.seed = pages, seed
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.fd = fcntl.ioctl(self.kvm, CREATE_VM, SW_PROTECTED_VM if protected else 0)
        self.memory = os.memfd_create("guest")
        os.ftruncate(self.memory, pages * PAGE)
        self.guest_view = mmap.mmap(self.memory, pages * PAGE)
        self.install_view = mmap.mmap(self.memory, pages * PAGE)
        self.bitmap_file = os.memfd_create("bitmap")
        os.ftruncate(self.bitmap_file, -(-pages // (8 * PAGE)) * PAGE)
        self.bitmap = mmap.mmap(self.bitmap_file, 0)
        self.programs = mmap.mmap(-1, PAGE)
        self.set_slot(number=1, flags=0, gpa=0, size=PAGE, address=address_of(self.programs))
        self.set_userfault(bitmap)
        self.vcpus = [Vcpu(self, number) for number in range(vcpus)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for fd in (*(vcpu.fd for vcpu in self.vcpus), self.fd, self.kvm, self.memory, self.bitmap_file):
            with contextlib.suppress(OSError):
                os.close(fd)

    def has(self, capability: int) -> int:
        return fcntl.ioctl(self.fd, CHECK_EXTENSION, capability)

    def statistic(self, name: str) -> int:
        """One of KVM's figures of this VM, a counter of 64 bits (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD)."""
        fd = fcntl.ioctl(self.fd, GET_STATS)
        try:
            stats = os.pread(fd, 1 << 16, 0)
        finally:
            os.close(fd)
        _, name_size, count, _, first, data = struct.unpack_from("<6I", stats)
        for at in range(first, first + count * (16 + name_size), 16 + name_size):
            if stats[at + 16 :].partition(b"\0")[0].decode() == name:
                (offset,) = struct.unpack_from("<I", stats, at + 8)
                return int.from_bytes(stats[data + offset :][:8], "little")
        raise LookupError(name)

    def set_slot(self, *, flags: int, address: int, number: int = 0, gpa: int = BASE, size: int = 0, bitmap: int = 0) -> None:
        region = struct.pack("<IIQQQQIIQ", number, flags, gpa, size or self.pages * PAGE, address, 0, 0, 0, bitmap)
        fcntl.ioctl(self.fd, SET_MEMORY2, region.ljust(160, b"\0"))

    def set_userfault(self, on: bool) -> None:
        """Turns the flag of the memory's slot on or off."""
        flags, bitmap = (MEM_USERFAULT, address_of(self.bitmap)) if on else (0, 0)
        self.set_slot(flags=flags, address=address_of(self.guest_view), bitmap=bitmap)

    def set_attribute(self, page: int, count: int, on: bool) -> None:
        """Sets or clears the attribute PRIVATE."""
        fcntl.ioctl(self.fd, SET_ATTRIBUTES, struct.pack("<4Q", BASE + page * PAGE, count * PAGE, PRIVATE if on else 0, 0))

    def set_bits(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.bitmap[page // 8] |= 1 << page % 8

    def clear_bit(self, page: int) -> None:
        """One byte's store, after every store before it: x86 keeps that order."""
        self.bitmap[page // 8] &= ~(1 << page % 8)

    def install(self, page: int) -> None:
        """Writes a page's contents through the install view."""
        self.install_view[page * PAGE : (page + 1) * PAGE] = page_contents(page, self.seed)

    def start(self, program: bytes, registers: Registers, vcpu: int = 0) -> Vcpu:
        at = 64 * vcpu
        self.programs[at : at + len(program)] = program
        self.vcpus[vcpu].start(at, registers)
        return self.vcpus[vcpu]

    def start_check(self, first: int = 0, count: int | None = None, step: int = 4, vcpu: int = 0) -> Vcpu:
        """Has the guest read pages, every dword of them unless `step` says otherwise; ecx counts what differs."""
        start = BASE + first * PAGE
        end = start + (self.pages if count is None else count) * PAGE
        return self.start(CHECK, Registers(edx=step, esi=start, edi=end, ebp=self.seed), vcpu)

    def exits_of_touching(self, pages: Iterable[int]) -> list[int]:
        """Has the guest read each of these pages once, and returns which of them came back; their bits stay as they are."""
        return list(self._touch(pages))

    def _touch(self, pages: Iterable[int]) -> Iterator[int]:
        for page in pages:
            exit_ = self.start_check(page, 1, PAGE).run()
            if exit_.reason == EXIT_MEMORY_FAULT:
                yield exit_.page
            elif exit_.reason != EXIT_HLT:
                raise AssertionError(f"touching page {page} ended with {exit_}")
