"""What the head of a state file says: whether it is one, and in which format it was written."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from latepage.errors import FirecrackerError
from latepage.firecracker.version import made_by

__all__ = ["StateFile"]

# src/vmm/src/snapshot/mod.rs: SNAPSHOT_MAGIC_ID of x86_64. Until 1.6 its lowest 16 bits were the format's number.
_X86_64 = bytes.fromhex("6486841910 07")
_AARCH64 = bytes.fromhex("aaaa841910 07")
_HEAD = 64

LARGEST = 64 << 20
"""Bytes beyond which a file is no state file: Firecracker itself reads 10 MB at most."""


@dataclass(frozen=True, slots=True)
class StateFile:
    """A state file of Firecracker. Only Firecracker can tell whether it is right: what looks strange here is not refused.

    Attributes:
        path: where it is.
        size: bytes.
        architecture: of its VM, `x86_64` or `aarch64`; None where it does not begin as state files do.
        format: the version of its format, as `firecracker --describe-snapshot` prints it; None where it is older than
            formats with a version (Firecracker 1.6), or not known.
    """

    path: Path
    size: int
    architecture: str | None
    format: str | None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the head of a state file.

        Raises:
            FirecrackerError: it is missing, unreadable, or no regular file.
        """
        path = Path(path)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise FirecrackerError(f"state file {path}: it is no regular file")
            with path.open("rb") as file:
                head = file.read(_HEAD)
        except OSError as error:
            why = error.strerror or str(error)
            raise FirecrackerError(f"state file {path}: {why}", call="open", errno=error.errno) from None
        for architecture, magic in (("x86_64", _X86_64), ("aarch64", _AARCH64)):
            if head[2:8] == magic:
                # 1.7 to 1.16 (bincode): the magic number, 8 bytes of length, and the version as text.
                length = int.from_bytes(head[8:16], "little")
                return cls(path, status.st_size, architecture, _version(head[16:], length))
            if head[3:9] == magic:
                # Since 1.17 (bitcode): the same with a byte before the number, and one byte of length.
                length = int.from_bytes(head[9:10], "little")
                return cls(path, status.st_size, architecture, _version(head[10:], length))
        return cls(path, status.st_size, None, None)

    @property
    def made_by(self) -> str:
        """Which Firecracker wrote it, in words."""
        if self.architecture is None:
            return "not known"
        if self.format is None:
            return "Firecracker 1.6 or older"
        known = made_by(int(self.format.partition(".")[0]))
        return f"Firecracker {known}" if known else "a Firecracker that is newer than this latepage"

    def __str__(self) -> str:
        return f"{self.path} (format {self.format or 'before 1.0'}, {self.made_by})" if self.architecture else str(self.path)


def _version(text: bytes, length: int) -> str | None:
    found = re.fullmatch(rb"\d+\.\d+\.\d+", text[:length]) if length <= len(text) else None
    return found[0].decode() if found else None
