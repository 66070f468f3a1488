"""What a user may do with a device node: by its owner, its mode and its POSIX ACL.

The layout of the ACL is `linux/posix_acl_xattr.h`, the order of the looks `acl(5)`, "Access check algorithm".
"""

import grp
import os
import pwd
import stat
import struct
from dataclasses import dataclass
from typing import Literal

__all__ = ["Account", "Node", "Rule"]

ACL = "system.posix_acl_access"
ACL_VERSION = 2
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
READ_WRITE = 6
NAMED: dict[int, Literal["user", "group"]] = {USER: "user", GROUP: "group"}
"""The entries of an ACL that name somebody."""

Rule = tuple[int, int, int]
"""An entry of an ACL: tag, permissions, and the user's or group's id."""


@dataclass(frozen=True, slots=True)
class Account:
    """A user with all its groups.

    Attributes:
        name: as it was given, or as the system calls it.
        uid: its number.
        gid: its first group.
        groups: all its groups, the first among them.
    """

    name: str
    uid: int
    gid: int
    groups: frozenset[int]

    @classmethod
    def find(cls, name: str) -> "Account":
        """A user by name, by number, or as `UID:GID` (no further groups): a jail's user needs no name.

        >>> Account.find("0:0")
        Account(name='0:0', uid=0, gid=0, groups=frozenset({0}))

        Raises:
            ValueError: if there is no such user; the message says what could be given instead.
        """
        uid, colon, gid = name.partition(":")
        if colon and uid.isdecimal() and gid.isdecimal():
            account = cls(name, int(uid), int(gid), frozenset({int(gid)}))
        elif name.isdecimal():
            try:
                entry = pwd.getpwuid(int(name))
            except (KeyError, OverflowError):
                raise ValueError(f"user {name} is not known here, so its groups are not either: give UID:GID") from None
            account = cls._of(entry)
        else:
            try:
                account = cls._of(pwd.getpwnam(name))
            except KeyError:
                raise ValueError(f"there is no user {name!r} here: give a name that is, or UID:GID") from None
        if max(account.uid, account.gid) >= (1 << 32) - 1:
            raise ValueError(f"{name} is no user's id")
        return account

    @classmethod
    def _of(cls, entry: pwd.struct_passwd) -> "Account":
        groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, frozenset(groups) | {entry.pw_gid})


@dataclass(frozen=True, slots=True)
class Node:
    """A device node, as far as rights go.

    Attributes:
        path: where it is.
        uid: its owner.
        gid: its group.
        mode: its permissions.
        acl: the entries of its ACL; empty where it has none.
    """

    path: str
    uid: int
    gid: int
    mode: int
    acl: tuple[Rule, ...] = ()

    @classmethod
    def look(cls, path: str) -> "Node | None":
        """The node at that path, or None where there is none."""
        try:
            found = os.stat(path)  # noqa: PTH116 (the path is a device's, not a file's to be worked with)
        except OSError:
            return None
        try:
            acl = _entries(os.getxattr(path, ACL))
        except OSError:  # no ACL, or a file system without them
            acl = ()
        return cls(path, found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), acl)

    def lets(self, account: Account) -> bool:
        """Whether its permissions let that user read and write it.

        >>> alice, node = Account("alice", 1000, 100, frozenset({100})), Node("/dev/kvm", 0, 0, 0o600)
        >>> node.lets(alice), node.lets(Account("root", 0, 0, frozenset({0})))
        (False, True)
        >>> Node("/dev/kvm", 0, 100, 0o660).lets(alice)
        True
        """
        if account.uid == 0:
            return True
        if account.uid == self.uid:
            return self.mode >> 6 & READ_WRITE == READ_WRITE
        if not self.acl:
            bits = self.mode >> 3 if self.gid in account.groups else self.mode
            return bits & READ_WRITE == READ_WRITE
        mask = next((rule[1] for rule in self.acl if rule[0] == MASK), 7)
        for tag, bits, who in self.acl:
            if tag == USER and who == account.uid:
                return bits & mask & READ_WRITE == READ_WRITE
        groups = [
            bits
            for tag, bits, who in self.acl
            if (tag == GROUP and who in account.groups) or (tag == GROUP_OBJ and self.gid in account.groups)
        ]
        if groups:
            return any(bits & mask & READ_WRITE == READ_WRITE for bits in groups)
        return any(tag == OTHER and bits & READ_WRITE == READ_WRITE for tag, bits, _ in self.acl)

    def __str__(self) -> str:
        """As `ls -l` would say it, with the names that its ACL adds."""
        shown = f"{stat.filemode(self.mode | stat.S_IFCHR)} {_name('user', self.uid)} {_name('group', self.gid)}"
        named = [
            f"{kind}:{_name(kind, who)}:{stat.filemode(bits)[-3:]}"
            for tag, bits, who in self.acl
            if (kind := NAMED.get(tag)) is not None
        ]
        return f"{shown}, ACL {' '.join(named)}" if named else shown


def _entries(raw: bytes) -> tuple[Rule, ...]:
    if len(raw) < 4 or struct.unpack_from("<I", raw)[0] != ACL_VERSION:
        return ()
    return tuple(struct.iter_unpack("<HHI", raw[4 : 4 + (len(raw) - 4) // 8 * 8]))


def _name(kind: Literal["user", "group"], number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name if kind == "user" else grp.getgrgid(number).gr_name
    except (KeyError, OverflowError):
        return str(number)
