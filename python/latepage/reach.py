"""Whether another user could reach a path, and which folder or right is in the way: mode bits and access lists.

As root one could try it as that user; this tells it without being root, and says what to change.
"""

import os
import pwd
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Obstacle", "Owner", "obstacle"]

READ, WRITE, SEARCH = 4, 2, 1

_HIGHEST = 2**32 - 2
"""The next one says "leave it as it is" to chown(2)."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A user and a group, as numbers.

    >>> Owner.parse("123:100")
    Owner(uid=123, gid=100)
    >>> Owner.parse("nobody")
    Traceback (most recent call last):
    ...
    ValueError: 'nobody' is no owner: write it as UID:GID in numbers, as in 1000:1000
    """

    uid: int
    gid: int

    @classmethod
    def parse(cls, text: str) -> "Owner":
        """From `UID:GID`."""
        uid, colon, gid = text.partition(":")
        if not (colon and uid.isascii() and uid.isdecimal() and gid.isascii() and gid.isdecimal()):
            raise ValueError(f"{text!r} is no owner: write it as UID:GID in numbers, as in 1000:1000")
        owner = cls(int(uid), int(gid))
        if max(owner.uid, owner.gid) > _HIGHEST:
            raise ValueError(f"{text!r} is no owner: a user's and a group's number is at most {_HIGHEST}")
        return owner

    def __str__(self) -> str:
        return f"{self.uid}:{self.gid}"

    def groups(self) -> frozenset[int]:
        """Its group, and those that the system's database has for the user."""
        try:
            return frozenset(os.getgrouplist(pwd.getpwuid(self.uid).pw_name, self.gid))
        except KeyError:
            return frozenset({self.gid})


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What keeps a user from a path.

    Attributes:
        path: the folder or file that lacks a right.
        lacks: that right, in words.
        remedy: a command that would give it.
    """

    path: Path
    lacks: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.lacks} {self.path} ({_listed(self.path)}); try: {self.remedy}"


def obstacle(
    path: str | os.PathLike[str], owner: Owner, wanted: int = 0, *, more_groups: Iterable[int] | None = None
) -> Obstacle | None:
    """What keeps `owner` from using `path`, if anything does.

    Args:
        path: what is to be used; if it is not there, only its folders are looked at.
        owner: who would use it.
        wanted: READ | WRITE | SEARCH of the path itself.
        more_groups: those that it is in beside its own; None for those that the system's database has for the user.
    """
    if owner.uid == 0:
        return None
    groups = owner.groups() if more_groups is None else frozenset({owner.gid, *more_groups})
    real = Path(os.path.realpath(path))
    for folder in reversed(real.parents):
        if not _rights(folder, owner.uid, groups) & SEARCH:
            return Obstacle(folder, "may not pass through", f"setfacl -m u:{owner.uid}:x {folder}")
    if wanted and real.exists():
        given = _rights(real, owner.uid, groups)
        letters = "".join(letter for bit, letter in ((READ, "r"), (WRITE, "w"), (SEARCH, "x")) if wanted & bit)
        for bit, word in ((READ, "read"), (WRITE, "write to"), (SEARCH, "enter")):
            if wanted & bit and not given & bit:
                return Obstacle(real, f"may not {word}", f"setfacl -m u:{owner.uid}:{letters} {real}")
    return None


_ACCESS_LIST = "system.posix_acl_access"
# linux/posix_acl.h
_USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x02, 0x04, 0x08, 0x10, 0x20


def _rights(path: Path, uid: int, groups: frozenset[int]) -> int:
    """The rights that a user has, as acl(5) tells: READ | WRITE | SEARCH."""
    try:
        status = path.stat()
    except OSError:
        # What cannot be looked at cannot be judged; whoever tries it will hear why.
        return READ | WRITE | SEARCH
    mode = stat.S_IMODE(status.st_mode)
    if uid == status.st_uid:
        return mode >> 6 & 7
    try:
        raw = os.getxattr(path, _ACCESS_LIST)
    except OSError:
        return (mode >> 3 & 7) if status.st_gid in groups else mode & 7
    entries: list[tuple[int, int, int]] = list(struct.iter_unpack("<HHI", raw[4:]))
    mask = next((rights for tag, rights, _ in entries if tag == _MASK), 7)
    for tag, rights, name in entries:
        if tag == _USER and name == uid:
            return rights & mask
    of_groups = [
        rights & mask
        for tag, rights, name in entries
        if (tag == _GROUP_OBJ and status.st_gid in groups) or (tag == _GROUP and name in groups)
    ]
    if of_groups:
        # One group must give all that is wanted; the union is near enough to name what is missing.
        return max(of_groups, key=int.bit_count)
    return next((rights for tag, rights, _ in entries if tag == _OTHER), 0)


def _listed(path: Path) -> str:
    status = path.stat()
    return f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid}"
