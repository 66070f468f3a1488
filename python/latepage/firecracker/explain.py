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

_NO_SUCH_DEVICE = {
    "unknown network device": "the VM of this snapshot has no network interface of that name (--network NAME=DEVICE)",
    "unknown vsock device": "the VM of this snapshot has no vsock device: leave --vsock out",
}
# SnapshotStateFromFileError::Load since 1.5, and snapshot::Error before.
_NOT_READ = ("failed to load snapshot state from file", "data version", "serializ", "magic", "crc")


def explanation(error: FirecrackerError, state: StateFile, version: Version, owner: Owner | None) -> str | None:
    """Our words above Firecracker's, if there is something to add."""
    said = (error.fault_message or "").lower()
    if not said:
        return None
    for phrase, ours in _NO_SUCH_DEVICE.items():
        if phrase in said:
            return ours
    if any(phrase in said for phrase in _NOT_READ):
        return _format_of(state, version)
    # Of another user's groups it has none but the one that was named.
    user, groups = (owner, []) if owner is not None else (Owner(os.geteuid(), os.getegid()), os.getgroups())
    for device, words in _DEVICES:
        if any(word in said for word in words) and "os error 2" not in said:
            if not Path(device).exists():
                return f"{device} is not there: `latepage check` says what to do"
            blocked = obstacle(device, user, READ | WRITE, more_groups=groups)
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
