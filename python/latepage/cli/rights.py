"""What this process may not do, and would need to do for the policy it was given."""

import os
import re
from pathlib import Path

from latepage import _core
from latepage.policy import Policy

__all__ = ["lacking"]

CAP_KILL = 5  # linux/capability.h


def lacking(policy: Policy) -> list[str]:
    """One line for each right that is missing, with what follows from it.

    >>> lacking(Policy(allow_uids={os.geteuid()}))
    []
    """
    lines = []
    others = any(uid != os.geteuid() for uid in policy.allow_uids) if policy.allow_uids else bool(policy.mode & 0o066)
    if policy.on_missing == "kill" and others and not _capability(CAP_KILL):
        lines.append(
            "without CAP_KILL, a VM of another user cannot be killed when a page cannot be had: it waits; "
            "run as root, or serve only your own VMs (--allow-uid)"
        )
    if policy.on_missing == "poison" and not _can_poison():
        lines.append("this kernel has no UFFDIO_POISON (Linux 6.6): a VM whose page cannot be had is killed instead")
    return lines


def _can_poison() -> bool:
    features = _core.userfaultfd_features()
    if features is None:
        # A pager need not be allowed to make a userfaultfd itself: then only the version can tell.
        major, minor = re.findall(r"\d+", os.uname().release)[:2]
        return (int(major), int(minor)) >= (6, 6)
    return "poison" in features


def _capability(number: int) -> bool:
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return effective is not None and bool(int(effective[1], 16) >> number & 1)
