"""What permissions let a user do is what the kernel then lets that user do."""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from latepage.check import Account
from latepage.check.access import ACL, GROUP, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, Node

NOBODY = 65534
MINE, OTHERS = 4242, 4243
ALICE = Account("alice", NOBODY, MINE, frozenset({MINE}))
NO_ID = 0xFFFF_FFFF


def acl(*rules: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
    return tuple(sorted(((USER_OBJ, 6, NO_ID), (GROUP_OBJ, 0, NO_ID), (OTHER, 0, NO_ID), *rules), key=lambda rule: rule[0]))


CASES = [
    pytest.param(0o600, 0, 0, (), False, id="root's alone"),
    pytest.param(0o666, 0, 0, (), True, id="everybody's"),
    pytest.param(0o660, 0, MINE, (), True, id="her group's"),
    pytest.param(0o660, 0, OTHERS, (), False, id="another group's"),
    pytest.param(0o640, 0, MINE, (), False, id="her group may only read"),
    pytest.param(0o606, 0, MINE, (), False, id="everybody's but her group's"),
    pytest.param(0o600, NOBODY, 0, (), True, id="hers"),
    pytest.param(0o066, NOBODY, 0, (), False, id="everybody's but hers"),
    pytest.param(0o660, 0, 0, acl((USER, 6, NOBODY), (MASK, 6, NO_ID)), True, id="an ACL names her"),
    pytest.param(0o660, 0, 0, acl((USER, 4, NOBODY), (MASK, 6, NO_ID)), False, id="an ACL lets her read"),
    pytest.param(0o640, 0, 0, acl((USER, 6, NOBODY), (MASK, 4, NO_ID)), False, id="an ACL names her and masks it"),
    pytest.param(0o660, 0, 0, acl((USER, 6, 4711), (MASK, 6, NO_ID)), False, id="an ACL names another"),
    pytest.param(0o660, 0, 0, acl((GROUP, 6, MINE), (MASK, 6, NO_ID)), True, id="an ACL names her group"),
    pytest.param(0o660, 0, 0, acl((GROUP, 4, MINE), (MASK, 6, NO_ID)), False, id="an ACL lets her group read"),
    pytest.param(0o666, 0, 0, acl((GROUP, 0, MINE), (MASK, 6, NO_ID)), False, id="an ACL shuts her group out"),
]


@contextlib.contextmanager
def being(account: Account) -> Iterator[None]:
    groups, gid = os.getgroups(), os.getegid()
    os.setgroups(sorted(account.groups))
    os.setegid(account.gid)
    os.seteuid(account.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


@pytest.mark.needs_root
@pytest.mark.parametrize(("mode", "uid", "gid", "rules", "allowed"), CASES)
def test_what_is_read_off_a_file_is_what_opening_it_says(
    folder: Path, mode: int, uid: int, gid: int, rules: tuple[tuple[int, int, int], ...], allowed: bool
) -> None:
    file = folder / "node"
    file.touch()
    os.chown(file, uid, gid)
    file.chmod(mode)
    if rules:
        try:
            os.setxattr(file, ACL, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *rule) for rule in rules))
        except OSError as error:
            pytest.skip(f"no POSIX ACLs in {folder.parent}: {error.strerror}")
        file.chmod(mode)
    folder.chmod(0o755)
    node = Node.look(str(file))
    assert node is not None
    with being(ALICE):
        try:
            os.close(os.open(file, os.O_RDWR))
            opened = True
        except PermissionError:
            opened = False
    assert opened == node.lets(ALICE) == allowed


def test_a_node_says_whom_its_acl_names() -> None:
    node = Node("/dev/userfaultfd", 0, 0, 0o660, acl((USER, 6, 4711), (GROUP, 4, 4712), (MASK, 6, NO_ID)))
    assert str(node) == "crw-rw---- root root, ACL user:4711:rw- group:4712:r--"


def test_a_user_is_found_by_name_by_number_and_with_its_group() -> None:
    assert Account.find("root").uid == Account.find("0").uid == Account.find("0:0").uid == 0
    jailed = Account.find("123456:654321")
    assert (jailed.uid, jailed.gid, jailed.groups) == (123456, 654321, frozenset({654321}))


@pytest.mark.parametrize("name", ["", "no such user", "-1", "1:", ":1", "a:b", "3999999999", "4294967295:0"])
def test_a_user_that_is_none_is_refused_with_what_could_be_given(name: str) -> None:
    with pytest.raises(ValueError, match=r"UID:GID|no user's id"):
        Account.find(name)
