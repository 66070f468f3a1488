"""What this process may not do, and would need to do for the policy it was given. `latepage check` looks at the same things."""

import os

from latepage.check.capabilities import CAP_KILL, OWN_VMS, has_capability
from latepage.check.kernel import too_old
from latepage.check.userfaultfd import can_poison
from latepage.policy import Policy

__all__ = ["lacking"]


def lacking(policy: Policy) -> list[str]:
    """One line for each right that is missing, with what follows from it.

    >>> lacking(Policy(allow_uids={os.geteuid()}))
    []
    """
    lines = [] if too_old() is None else [f"{too_old()}: see `latepage check`"]
    others = any(uid != os.geteuid() for uid in policy.allow_uids) if policy.allow_uids else bool(policy.mode & 0o066)
    if policy.on_missing == "kill" and others and not has_capability(CAP_KILL):
        lines.append(f"without CAP_KILL, a VM of another user cannot be killed when a page cannot be had: it waits; {OWN_VMS}")
    if policy.on_missing == "poison" and not can_poison():
        lines.append("this kernel has no UFFDIO_POISON (Linux 6.6): a VM whose page cannot be had is killed instead")
    return lines
