"""What /proc tells of a process: its descriptors, its mappings, its threads (proc(5)).

Every function answers for one moment. What has gone meanwhile is left out; what may not be seen raises PermissionError, and a
process that has gone ProcessLookupError or FileNotFoundError.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = [
    "Descriptor",
    "Mode",
    "Region",
    "Status",
    "Thread",
    "descriptors",
    "is_enclosed",
    "processes",
    "regions",
    "status",
    "threads",
]

USERFAULTFD = "anon_inode:[userfaultfd]"
EVENTPOLL = "anon_inode:[eventpoll]"
KERNEL_THREAD = 0x0020_0000
"""PF_KTHREAD of `linux/sched.h`, in the flags of /proc/PID/stat."""

FIRST_NAMESPACES = {"pid": 0xEFFF_FFFC, "user": 0xEFFF_FFFD}
"""PROC_PID_INIT_INO and PROC_USER_INIT_INO of `linux/proc_ns.h`: the inodes of the namespaces that the machine starts with."""

Mode = Literal["missing", "write_protect", "minor"]
MODES: dict[str, Mode] = {"um": "missing", "uw": "write_protect", "ui": "minor"}
"""VmFlags of /proc/PID/smaps, and the registration that each stands for."""

Waits = Literal["page", "event"]
WAITS: dict[str, Waits] = {"handle_userfault": "page", "userfaultfd_event_wait_completion": "event"}
"""Functions of the kernel's `fs/userfaultfd.c` in which a thread sleeps, and what it waits for there."""


@dataclass(frozen=True, slots=True)
class Status:
    """A process.

    Attributes:
        pid: its number.
        name: of its program, as the kernel has it (15 bytes).
        command: its command line, or its name.
        state: one letter, as in ps(1): `T` is stopped, `Z` has ended.
        uid: its user.
        is_kernel: whether it is a thread of the kernel.
    """

    pid: int
    name: str
    command: str
    state: str
    uid: int
    is_kernel: bool

    @property
    def words(self) -> list[str]:
        """Its command line without folders and the interpreter of Python.

        >>> Status(7, "python", "/usr/bin/python -m latepage serve a.sock guest.mem", "S", 0, False).words[:2]
        ['latepage', 'serve']
        """
        words = self.command.split(" ")
        if words[0].rpartition("/")[2].startswith("python") and len(words) > 1:
            words = words[2:] if words[1] == "-m" and len(words) > 2 else words if words[1].startswith("-") else words[1:]
        return [words[0].rpartition("/")[2], *words[1:]]

    def __str__(self) -> str:
        """Its number, and what it is.

        >>> str(Status(7, "firecracker", "/bin/firecracker --id a", "S", 0, False))
        'process 7 (firecracker)'
        """
        words = self.words
        shown = " ".join(words[:2]) if words[0] in ("latepage", "latepage.kvm") else words[0]
        return f"process {self.pid} ({shown[:40]})"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A userfaultfd in a process.

    Attributes:
        number: in that process.
        inode: of the open file: on kernels that give each userfaultfd its own (5.12 and later), its name.
        pending: faults that nobody has read.
        waiting: all faults that wait, those among them.
        features: the bits that its maker asked for.
    """

    number: int
    inode: int
    pending: int
    waiting: int
    features: int


@dataclass(frozen=True, slots=True)
class Region:
    """A mapping that is registered with a userfaultfd.

    Attributes:
        start: address of its first byte.
        size: bytes.
        present: bytes that are mapped there now.
        page_size: bytes.
        modes: which faults are reported.
        path: what is mapped; empty for anonymous memory.
    """

    start: int
    size: int
    present: int
    page_size: int
    modes: tuple[Mode, ...]
    path: str


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread that waits for a userfaultfd.

    Attributes:
        tid: its number.
        name: its name.
        waits_for: a page, or that an event is read (a discard, a fork, an unmapping).
        turns: how often it has gone to sleep: the same number later means that it has not run since.
    """

    tid: int
    name: str
    waits_for: Waits
    turns: int


def is_enclosed() -> bool:
    """Whether this process is in a container: there may be processes outside that do not show, or may not be looked into."""
    for name, first in FIRST_NAMESPACES.items():
        try:
            if os.stat(f"/proc/self/ns/{name}").st_ino != first:  # noqa: PTH116 (as the other looks into /proc)
                return True
        except FileNotFoundError:  # a kernel without such namespaces
            continue
    return False


def processes() -> list[int]:
    """The numbers of all processes that are shown here."""
    return sorted(int(entry.name) for entry in os.scandir("/proc") if entry.name.isdecimal())


def status(pid: int) -> Status:
    """Who that is."""
    folder = Path(f"/proc/{pid}")
    # The name may hold spaces and brackets, so what follows it is counted from the last bracket.
    stat = (folder / "stat").read_text(errors="replace")
    name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
    uid = re.search(r"^Uid:\s*(\d+)", (folder / "status").read_text(errors="replace"), re.MULTILINE)
    words = (folder / "cmdline").read_bytes().split(b"\0")
    command = " ".join(word.decode(errors="replace") for word in words).strip()
    return Status(pid, name, command or name, rest[0], int(uid[1]) if uid else -1, bool(int(rest[6]) & KERNEL_THREAD))


def links(pid: int) -> Iterator[tuple[int, str]]:
    """Its descriptors: number, and what each is."""
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):  # noqa: PTH208 (a Path for each of many thousands is slow)
        try:
            yield int(name), os.readlink(f"{folder}/{name}")  # noqa: PTH115
        except FileNotFoundError:  # closed since it was listed
            continue


def descriptors(pid: int) -> tuple[Descriptor, ...]:
    """Its userfaultfds."""
    found = []
    for number, link in links(pid):
        if link != USERFAULTFD:
            continue
        try:
            said = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
            inode = os.stat(f"/proc/{pid}/fd/{number}").st_ino  # noqa: PTH116 (as above)
        except FileNotFoundError:
            continue
        pending, waiting = (re.search(rf"^{field}:\s*(\d+)", said, re.MULTILINE) for field in ("pending", "total"))
        api = re.search(r"^API:\s*[0-9a-f]+:([0-9a-f]+):", said, re.MULTILINE)
        found.append(
            Descriptor(
                number,
                inode,
                int(pending[1]) if pending else 0,
                int(waiting[1]) if waiting else 0,
                int(api[1], 16) if api else 0,
            )
        )
    return tuple(sorted(found, key=lambda descriptor: descriptor.number))


def polls(pid: int, number: int) -> bool:
    """Whether an epoll of that process watches the descriptor. Other ways of waiting do not show."""
    watched = re.compile(rf"^tfd:\s*{number}\s", re.MULTILINE)
    for poller, link in links(pid):
        if link == EVENTPOLL:
            try:
                if watched.search(Path(f"/proc/{pid}/fdinfo/{poller}").read_text()):
                    return True
            except FileNotFoundError:
                continue
    return False


def is_vmm(pid: int) -> bool:
    """Whether it has a VM of KVM."""
    return any(link.startswith("anon_inode:kvm-vm") for _, link in links(pid))


def regions(pid: int) -> tuple[Region, ...]:
    """Its mappings that are registered with a userfaultfd, in the order of their addresses."""
    found: list[Region] = []
    start = end = present = page = 0
    path = ""
    with Path(f"/proc/{pid}/smaps").open(errors="replace") as lines:
        for line in lines:
            field, _, rest = line.partition(" ")
            if not field.endswith(":"):
                start, end = (int(side, 16) for side in field.split("-"))
                path = (rest.split(maxsplit=4)[4:] or [""])[0].strip()
                present = page = 0
            elif field in ("Rss:", "Shared_Hugetlb:", "Private_Hugetlb:"):
                present += int(rest.split()[0]) << 10
            elif field == "KernelPageSize:":
                page = int(rest.split()[0]) << 10
            elif field == "VmFlags:":
                modes = tuple(MODES[flag] for flag in rest.split() if flag in MODES)
                if modes:
                    found.append(Region(start, end - start, present, page, modes, path))
    return tuple(found)


def threads(pid: int) -> tuple[Thread, ...] | None:
    """Its threads that wait for a userfaultfd, or None where the kernel does not say in what a thread sleeps."""
    found = []
    told = False
    for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda task: int(task.name)):
        try:
            place = (task / "wchan").read_text().strip()
            said = (task / "status").read_text(errors="replace")
            name = (task / "comm").read_text(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # "0" for one that runs, and for all where the kernel does not tell.
        told |= place not in ("0", "") or "\nState:\tR" in said
        if place in WAITS:
            turns = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", said, re.MULTILINE)
            found.append(Thread(int(task.name), name, WAITS[place], int(turns[1]) if turns else 0))
    return tuple(found) if told else None
