"""What a pager needs of its own process. It makes no userfaultfd: it is sent them."""

import errno
import fcntl
import os
import resource
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from latepage import _core
from latepage.check.capabilities import (
    CAP_IPC_LOCK,
    CAP_KILL,
    CAP_SYS_NICE,
    CAP_SYS_PTRACE,
    OWN_VMS,
    has_capability,
    read_setting,
)
from latepage.check.items import Item, known

__all__ = ["pager_items", "room_for"]

DESCRIPTORS_FOR_ITSELF = 96
"""What a pager with one socket and four workers holds before any VM comes, and some room. 70 of them it keeps free for what a
handshake may bring, with 64 userfaultfds and a memory file: without them it hears no VM."""
DESCRIPTORS_FOR_A_VM = 3
"""Its connection, its userfaultfd and its pidfd; one that shares a memory file with the pager takes another one, and one with
several userfaultfds two more than it has of those."""
DESCRIPTORS_FOR_A_RECORDED_VM = DESCRIPTORS_FOR_A_VM + 1
"""With `--record`: its trace file too."""


def room_for(descriptors: int, *, recorded: bool = False) -> int:
    """How many VMs a pager can hold with so many descriptors, whether or not it records them.

    >>> room_for(1024), room_for(1024, recorded=True), room_for(16)
    (309, 232, 0)
    """
    each = DESCRIPTORS_FOR_A_RECORDED_VM if recorded else DESCRIPTORS_FOR_A_VM
    return max(0, descriptors - DESCRIPTORS_FOR_ITSELF) // each


def pager_items() -> Iterator[Item]:
    """The subject `pager`."""
    yield _unix_socket()
    yield _pidfd()
    yield _peer_pidfd()
    yield from _installs()
    yield _kill()
    yield _look_into()
    yield _descriptors()
    yield _leases()
    yield _real_time()
    yield _nice()
    yield _cores()
    yield _cpu_weight()
    yield _memory_lock()
    yield _io_uring()


def _unix_socket() -> Item:
    failed: OSError | None = None
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            socket.send_fds(ours, [b"x"], [ours.fileno()])
            for descriptor in socket.recv_fds(theirs, 1, 1)[1]:
                os.close(descriptor)
    except OSError as error:
        failed = error
    return Item(
        key="pager.unix_socket",
        name="passing descriptors",
        state=known(failed is None),
        found="one was sent and received over a Unix socket" if failed is None else str(failed),
        need="serve",
        value=failed is None,
        todo=None if failed is None else "let this process have Unix sockets (a seccomp filter, RestrictAddressFamilies=?)",
    )


def _pidfd() -> Item:
    error = _core.may_signal(os.getpid())
    return Item(
        key="pager.pidfd",
        name="pidfd",
        state=known(error is None),
        found="a process can be watched and killed by it" if error is None else os.strerror(error),
        need="serve",
        value=error is None,
        todo=None if error is None else "let this process have pidfd_open(2) and pidfd_send_signal(2) (a seccomp filter?)",
    )


def _peer_pidfd() -> Item:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    there = True
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, 77))  # SO_PEERPIDFD, asm-generic/socket.h
        except OSError:
            there = False
    return Item(
        key="pager.peer_pidfd",
        name="pidfd of a peer",
        state=known(there),
        found="the very process that connected is watched" if there else "the process is looked up by its number instead",
        value=there,
        todo=None if there else "Linux 6.5 has it; only a number that is used again in that moment would be mistaken",
    )


def _installs() -> Iterator[Item]:
    tried = _core.userfaultfd_installs()
    for index, (key, name, need) in enumerate(
        (("install_copy", "installing by COPY", "serve"), ("install_continue", "installing by CONTINUE", "feature"))
    ):
        error = None if tried is None else tried[index]
        if tried is None:
            found = "not tried: every userfaultfd is refused here"
        else:
            found = "a page was installed and read back" if error is None else os.strerror(error)
        yield Item(
            key=f"pager.{key}",
            name=name,
            state=known(None if tried is None else error is None),
            found=found,
            need="serve" if need == "serve" else "feature",
            value=None if tried is None else error is None,
            todo=None
            if error is None
            else "shared memory is served by COPY instead"
            if index
            else "see what a seccomp filter refuses",
        )


def _kill() -> Item:
    there = has_capability(CAP_KILL)
    return Item(
        key="pager.kill",
        name="CAP_KILL",
        state=known(there),
        found="VMs of every user can be killed when a page cannot be had" if there else "VMs of other users cannot be killed",
        value=there,
        todo=None if there else OWN_VMS,
    )


def _look_into() -> Item:
    there = has_capability(CAP_SYS_PTRACE)
    scope = read_setting("/proc/sys/kernel/yama/ptrace_scope")
    yama = "no Yama" if scope is None else f"ptrace_scope {scope}"
    found = "with CAP_SYS_PTRACE, into every process" if there else "into processes of your own user"
    return Item(
        key="pager.ptrace",
        name="looking into VMs",
        state=known(there),
        found=f"{found} ({yama})",
        need="info",
        value={"cap_sys_ptrace": there, "ptrace_scope": scope},
        todo=None if there else "for `check PID` on another user's VM, run it as root",
    )


def _descriptors() -> Item:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = soft if soft != resource.RLIM_INFINITY else 1 << 30
    vms, recorded = room_for(most), room_for(most, recorded=True)
    enough = soft == hard or vms >= 1000
    shown = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    return Item(
        key="pager.descriptors",
        name="descriptors",
        state=known(enough),
        found=f"{soft:,} of {shown} allowed: room for about {vms:,} VMs ({recorded:,} with --record)",
        value={"soft": _limit(soft), "hard": _limit(hard), "vms": vms, "vms_recorded": recorded},
        todo=None if enough else f"for more VMs: ulimit -n {min(hard, 65536) if hard > 0 else 65536} (systemd: LimitNOFILE=)",
    )


def _leases() -> Item:
    enabled = read_setting("/proc/sys/fs/leases-enable")
    wait = read_setting("/proc/sys/fs/lease-break-time")
    granted: bool | None = None
    with suppress(OSError), tempfile.NamedTemporaryFile() as file:
        descriptor = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC)
        file.close()  # a read lease wants that nobody has it open for writing
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            granted = True
        except OSError:
            granted = False
        finally:
            os.close(descriptor)
    if granted:
        found = f"granted in {tempfile.gettempdir()}; a writer is held back for {wait} s at most"
    else:
        found = "not granted: a change to a memory file is seen afterwards, by its time of modification"
    todo = (
        "sysctl fs.leases-enable=1"
        if enabled == 0
        else "keep memory files on a local file system, the pager's own, or give it CAP_LEASE"
    )
    return Item(
        key="pager.leases",
        name="file leases",
        state=known(granted),
        found=found,
        value={"enabled": None if enabled is None else bool(enabled), "break_time": wait, "granted": granted},
        todo=None if granted else todo,
    )


def _real_time() -> Item:
    tried: list[OSError | None] = []

    def become() -> None:
        # The scheduling class is a thread's own, and ends with it.
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        except OSError as error:
            tried.append(error)
        else:
            tried.append(None)

    thread = threading.Thread(target=become)
    thread.start()
    thread.join()
    limit, nice = resource.getrlimit(resource.RLIMIT_RTPRIO)[0], has_capability(CAP_SYS_NICE)
    there = tried == [None]
    return Item(
        key="pager.real_time",
        name="real-time scheduling",
        state=known(there),
        found="a thread became SCHED_FIFO" if there else "a thread could not become SCHED_FIFO",
        need="feature",
        value={"granted": there, "rtprio": _limit(limit), "cap_sys_nice": nice},
        todo=None if there else "for serve --realtime: ulimit -r 1 (systemd: LimitRTPRIO=1), or CAP_SYS_NICE",
    )


def _nice() -> Item:
    # A thread may come down to 20 minus the limit; the limit of 0 allows none below what it has.
    limit, capable = resource.getrlimit(resource.RLIMIT_NICE)[0], has_capability(CAP_SYS_NICE)
    lowest = -20 if capable or limit == resource.RLIM_INFINITY else max(-20, 20 - limit)
    allowed = lowest < 0
    return Item(
        key="pager.nice",
        name="nice",
        state=known(allowed),
        found=f"down to {lowest}" if allowed else "nothing below 0",
        need="feature",
        value={"lowest": lowest, "limit": _limit(limit), "cap_sys_nice": capable},
        todo=None if allowed else "for serve --nice: ulimit -e 40 (systemd: LimitNICE=-20), or CAP_SYS_NICE",
    )


def _cores() -> Item:
    allowed, there = sorted(os.sched_getaffinity(0)), os.sysconf("SC_NPROCESSORS_ONLN")
    return Item(
        key="pager.cores",
        name="cores",
        state="yes",
        found=f"{_ranges(allowed)}, which is what --placement core:N may name ({len(allowed)} of {there} online)",
        need="info",
        value={"allowed": allowed, "online": there},
        todo="every worker shares the one core with its VMs: placement has nothing to choose" if len(allowed) == 1 else None,
    )


def _cpu_weight() -> Item:
    """The weight of this process's cgroup among its siblings (cgroup v2; 100 is what every group has that was given none)."""
    group = next((line.split("::", 1)[1].strip() for line in _lines("/proc/self/cgroup") if line.startswith("0::")), None)
    folder = Path("/sys/fs/cgroup") / (group or "").lstrip("/")
    weight = next(iter(_lines(folder / "cpu.weight")), None)
    if weight is None:
        found = "not known: no cgroup v2 with the CPU controller here"
    else:
        found = f"{weight.strip()} of 1 to 10,000; 100 is what every group begins with (systemd: CPUWeight=)"
    return Item(
        key="pager.cpu_weight",
        name="CPU weight",
        state="unknown" if weight is None else "yes",
        found=found,
        need="info",
        value={"weight": None if weight is None else int(weight)},
    )


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _ranges(cores: list[int]) -> str:
    """Core numbers as people write them.

    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _memory_lock() -> Item:
    limit, lock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_capability(CAP_IPC_LOCK)
    free = lock or limit == resource.RLIM_INFINITY
    found = "as much as wanted" if free else f"{limit >> 10:,} KiB"
    return Item(
        key="pager.memory_lock",
        name="locked memory",
        state=known(free),
        found=found,
        need="info",
        value={"limit": _limit(limit), "cap_ipc_lock": lock},
        todo=None if free else "to keep a pager out of swap: systemd LimitMEMLOCK=infinity, or MemorySwapMax=0",
    )


def _io_uring() -> Item:
    disabled, error = read_setting("/proc/sys/kernel/io_uring_disabled"), _core.io_uring()
    if error is None:
        found = "a ring was made"
    elif error == errno.ENOSYS:
        found = "not in this kernel"
    else:
        found = f"refused: {os.strerror(error)}"
    setting = "" if disabled is None else f" (kernel.io_uring_disabled = {disabled})"
    return Item(
        key="pager.io_uring",
        name="io_uring",
        state=known(error is None),
        found=found + setting,
        need="feature",
        value={"disabled": disabled, "errno": error},
        todo=None if error is None else "nothing must be: pages that are not in memory are read by threads, a few at a time",
    )


def _limit(value: int) -> int | None:
    """A limit as JSON has it: None for none."""
    return None if value == resource.RLIM_INFINITY else value
