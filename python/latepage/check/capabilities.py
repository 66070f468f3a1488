"""What the kernel's capabilities and limits leave to this process."""

import re
from pathlib import Path

__all__ = ["CAP_IPC_LOCK", "CAP_KILL", "CAP_SYS_NICE", "CAP_SYS_PTRACE", "OWN_VMS", "has_capability", "read_setting"]

# linux/capability.h
CAP_KILL = 5
CAP_IPC_LOCK = 14
CAP_SYS_PTRACE = 19
CAP_SYS_NICE = 23

OWN_VMS = "run as root (systemd: AmbientCapabilities=CAP_KILL), or serve only your own VMs (--allow-uid)"
"""What to do without CAP_KILL."""


def has_capability(number: int) -> bool:
    """Whether this process has that capability in effect."""
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return effective is not None and bool(int(effective[1], 16) >> number & 1)


def read_setting(path: str) -> int | None:
    """A number that the kernel keeps in /proc/sys or /sys, or None where it has no such setting or does not show it.

    >>> read_setting("/proc/sys/no/such/setting") is None
    True
    """
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
