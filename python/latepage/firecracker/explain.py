"""What stands behind Firecracker's words, where we can tell: said above them, never instead of them."""

import os
import platform
from pathlib import Path

from latepage.errors import FirecrackerError
from latepage.firecracker.state_file import StateFile
from latepage.firecracker.version import Version, made_by
from latepage.reach import READ, WRITE, Owner, obstacle

__all__ = ["explanation"]

_DEVICES = (("/dev/kvm", ("kvm",)), ("/dev/userfaultfd", ("userfault", "uffd")))


def explanation(error: FirecrackerError, state: StateFile, version: Version, owner: Owner | None) -> str | None:
    """Our words above Firecracker's, if there is something to add."""
    said = (error.fault_message or "").lower()
    if not said:
        return None
    if any(word in said for word in ("snapshot state from file", "snapshot file", "data version", "deserializ")) or (
        "magic" in said or "crc" in said
    ):
        return _format_of(state, version)
    user = owner or Owner(os.geteuid(), os.getegid())
    for device, words in _DEVICES:
        if any(word in said for word in words) and "os error 2" not in said:
            if not Path(device).exists():
                return f"{device} is not there: `latepage check` says what to do"
            blocked = obstacle(device, user, READ | WRITE)
            if blocked is not None:
                return f"Firecracker runs as user {user.uid}, which {blocked}"
    return None


def _format_of(state: StateFile, version: Version) -> str:
    if state.architecture is None:
        return (
            f"{state.path} does not begin as Firecracker's state files do: is it the memory file, "
            "or was it written by another VMM, or by a Firecracker newer than this latepage?"
        )
    if state.architecture != platform.machine():
        return f"{state.path} is the state of a VM of {state.architecture}, and this is {platform.machine()}"
    ours = made_by_version(version)
    if state.format is not None and ours is not None and int(state.format.partition(".")[0]) == ours:
        return (
            f"{state.path} is in the format of Firecracker {version} ({state.format}), but it is damaged: take the snapshot again"
        )
    return (
        f"{state.path} was written in format {state.format or 'before 1.0'} ({state.made_by}), and Firecracker {version} cannot "
        "load it: restore it with the version that made it, or take the snapshot again"
    )


def made_by_version(version: Version) -> int | None:
    """The format that a Firecracker writes and reads, if it is known."""
    short = f"{version.major}.{version.minor}"
    return next((number for number in range(1, 100) if short in (made_by(number) or "").split(" or ")), None)
