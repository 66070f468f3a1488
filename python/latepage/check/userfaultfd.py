"""userfaultfd: whether the kernel has it, who may make one, and what it can do.

The features and the versions that brought them are those of `linux/userfaultfd.h`.
"""

import errno
import os
from collections.abc import Iterator
from functools import cache

from latepage import _core
from latepage.check.access import Node
from latepage.check.capabilities import read_setting
from latepage.check.items import Item, Need, known
from latepage.check.kernel import at_least

__all__ = ["DEVICE", "FEATURES", "SYSCTL", "allowed", "can_poison", "exists", "grant", "userfaultfd_items", "ways"]

DEVICE = "/dev/userfaultfd"
SYSCTL = "/proc/sys/vm/unprivileged_userfaultfd"

FEATURES: dict[str, tuple[str, Need, str]] = {
    # name: (the Linux that brought it, who needs it, what for)
    "pagefault_flag_wp": ("5.7", "later", "write-protection: dirty tracking, to come"),
    "event_fork": ("4.11", "info", "a message when the VMM forks"),
    "event_remap": ("4.11", "info", "a message when the VMM moves memory"),
    "event_remove": ("4.11", "serve", "balloons: without it a discarded page would come back from the snapshot"),
    "missing_hugetlbfs": ("4.11", "feature", "guests on 2 MiB pages"),
    "missing_shmem": ("4.11", "feature", "guests on shared memory"),
    "event_unmap": ("4.11", "info", "a message when the VMM unmaps memory"),
    "sigbus": ("4.14", "info", "a signal to the faulting thread; blind under KVM"),
    "thread_id": ("4.14", "info", "the faulting thread's id with each fault"),
    "minor_hugetlbfs": ("5.13", "later", "huge pages that several VMs share, to come"),
    "minor_shmem": (
        "5.14",
        "feature",
        "installing into shared memory by a write and CONTINUE: VMs that post to a channel, private memory with its file",
    ),
    "exact_address": ("5.18", "info", "addresses to the byte"),
    "wp_hugetlbfs_shmem": ("5.19", "later", "write-protection of huge and shared pages, to come"),
    "wp_unpopulated": ("6.4", "later", "write-protection of pages that are not there yet, to come"),
    "poison": ("6.6", "feature", "--on-missing poison; without it such a VM is killed"),
    "wp_async": ("6.7", "later", "dirty tracking in the kernel, to come"),
    "move": ("6.8", "later", "moving pages instead of copying them, to come"),
}


@cache
def ways() -> tuple[int | None, int | None]:
    """What making a userfaultfd says, by the device and by the system call: None for done, or the errno."""
    return _core.userfaultfd_ways()


def allowed() -> bool:
    """Whether this process may make one that sees the faults of KVM."""
    return None in ways()


def exists() -> bool:
    """Whether this kernel has userfaultfd at all."""
    return ways()[1] != errno.ENOSYS or Node.look(DEVICE) is not None


def can_poison() -> bool:
    """Whether this kernel has UFFDIO_POISON; by its version where a userfaultfd is refused altogether."""
    features = _core.userfaultfd_features()
    return at_least(6, 6) if features is None else "poison" in features


def grant(user: str = "USER") -> str:
    """What an administrator does so that a user may make userfaultfds."""
    return f"setfacl -m u:{user}:rw {DEVICE}"


def userfaultfd_items() -> Iterator[Item]:
    """The subject `userfaultfd`."""
    there = exists()
    yield Item(
        key="userfaultfd.kernel",
        name="in the kernel",
        state=known(there),
        found="yes" if there else "no (CONFIG_USERFAULTFD is off)",
        need="serve",
        value=there,
        todo=None if there else "use a kernel that was built with CONFIG_USERFAULTFD=y",
    )
    yield _device()
    yield _syscall()
    yield _sysctl()
    offered = _core.userfaultfd_features()
    for name, (since, need, purpose) in FEATURES.items():
        has = name in offered if offered is not None else None
        yield Item(
            key=f"userfaultfd.feature.{name}",
            name=name,
            state=known(has),
            found="not asked: every userfaultfd is refused here" if has is None else purpose,
            need=need,
            value=has,
            todo=f"needs Linux {since} or later" if has is False and need in ("serve", "feature") else None,
        )


def _device() -> Item:
    node, error = Node.look(DEVICE), ways()[0]
    if error is None:
        found, todo = f"open to you ({node})", None
    elif node is None:
        found = "not there"
        todo = "Linux 6.1 makes it; in a container, pass it in (--device /dev/userfaultfd)"
    elif error in (errno.EACCES, errno.EPERM):
        found = f"closed to you ({node})"
        todo = f"only the VMM's user needs it; for that one: {grant()}"
    else:
        found, todo = os.strerror(error), f"look at why {DEVICE} does not open: ls -l {DEVICE}"
    value = None
    if node is not None:
        acl = [list(rule) for rule in node.acl]
        value = {"uid": node.uid, "gid": node.gid, "mode": f"{node.mode:04o}", "acl": acl}
    return Item(key="userfaultfd.device", name=DEVICE, state=known(error is None), found=found, value=value, todo=todo)


def _syscall() -> Item:
    error = ways()[1]
    if error is None:
        found = "open to you, for faults in the kernel too (KVM's are)"
    elif error == errno.EPERM:
        found = "closed to you: it wants CAP_SYS_PTRACE; the device is the better way"
    else:
        found = os.strerror(error)
    return Item(
        key="userfaultfd.syscall", name="userfaultfd(2)", state=known(error is None), found=found, need="info", value=error
    )


def _sysctl() -> Item:
    value = read_setting(SYSCTL)
    found = "0: as it should be" if value == 0 else "1: every process may stop the kernel in the middle of a copy"
    return Item(
        key="userfaultfd.sysctl",
        name="vm.unprivileged_userfaultfd",
        state=known(None if value is None else value == 0),
        found="not shown here" if value is None else found,
        need="info",
        value=value,
        todo=f"set it to 0, and let the VMM's user alone have the device: {grant()}" if value else None,
    )
