"""Who can reach a path: mode bits and access lists, as the kernel judges them."""

import os
import struct
import subprocess
from pathlib import Path

import pytest

from latepage.reach import READ, SEARCH, WRITE, Owner, obstacle

NOBODY = Owner(65534, 65534)
IN_GROUP = Owner(65534, 4242)


@pytest.fixture
def file(folder: Path) -> Path:
    """A file in a folder in a folder, all of which anyone may read."""
    folder.chmod(0o755)
    inner = folder / "inner"
    inner.mkdir(mode=0o755)
    path = inner / "file"
    path.write_text("x")
    path.chmod(0o644)
    return path


def test_what_everybody_may_read_has_no_obstacle(file: Path) -> None:
    assert obstacle(file, NOBODY, READ) is None


def test_root_passes_everywhere(file: Path) -> None:
    file.parent.chmod(0)
    assert obstacle(file, Owner(0, 0), READ | WRITE) is None


@pytest.mark.parametrize("level", [0, 1])
def test_a_folder_that_lets_nobody_through_is_named_with_what_to_do(file: Path, level: int) -> None:
    closed = file.parents[level]
    closed.chmod(0o700)
    found = obstacle(file, NOBODY, READ)
    assert found is not None
    assert found.path == closed
    assert f"may not pass through {closed} (drwx------" in str(found)
    assert f"setfacl -m u:65534:x {closed}" in str(found)


def test_a_file_without_the_right_is_named_with_the_right(file: Path) -> None:
    file.chmod(0o640)
    assert "may not read" in str(obstacle(file, NOBODY, READ))
    file.chmod(0o644)
    assert "may not write to" in str(obstacle(file, NOBODY, READ | WRITE))
    assert "may not write to" in str(obstacle(file.parent, NOBODY, WRITE | SEARCH))


def test_the_way_of_a_link_is_judged_where_it_leads(file: Path) -> None:
    link = file.parents[1] / "link"
    link.symlink_to(file)
    file.parent.chmod(0o700)
    found = obstacle(link, NOBODY, READ)
    assert found is not None
    assert found.path == file.parent


# linux/posix_acl.h: tags of an access list's entries, which are (tag, rights, id).
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NO_ID = 0xFFFFFFFF
Entry = tuple[int, int, int]


def give(path: Path, *entries: Entry) -> None:
    """Gives a file an access list."""
    raw = b"".join(struct.pack("<HHI", *entry) for entry in sorted(entries))
    try:
        os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + raw)
    except OSError as error:
        pytest.skip(f"no access lists on this file system: {error.strerror}")


@pytest.mark.needs_root
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o460, 0o006, 0o000])
@pytest.mark.parametrize("group", [0, 4242], ids="group of the file {}".format)
@pytest.mark.parametrize("owner", [NOBODY, IN_GROUP], ids=str)
def test_it_judges_mode_bits_as_the_kernel_does(file: Path, mode: int, group: int, owner: Owner) -> None:
    os.chown(file, 0, group)
    file.chmod(mode)
    agrees_with_the_kernel(file, owner)


@pytest.mark.needs_root
@pytest.mark.parametrize(
    "named",
    [
        [(USER, 4, 65534)],
        [(USER, 6, 65534), (MASK, 4, NO_ID)],
        [(USER, 0, 65534), (OTHER, 6, NO_ID)],
        [(GROUP, 4, 4242)],
        [(GROUP, 0, 4242), (OTHER, 6, NO_ID)],
        [(USER, 6, 1), (GROUP, 6, 4242), (MASK, 2, NO_ID)],
        [(GROUP_OBJ, 6, NO_ID), (MASK, 4, NO_ID)],
    ],
    ids=str,
)
@pytest.mark.parametrize("group", [0, 4242], ids="group of the file {}".format)
@pytest.mark.parametrize("owner", [NOBODY, IN_GROUP], ids=str)
def test_it_judges_access_lists_as_the_kernel_does(file: Path, named: list[Entry], group: int, owner: Owner) -> None:
    os.chown(file, 0, group)
    least = {USER_OBJ: 6, GROUP_OBJ: 0, MASK: 6, OTHER: 0}
    rest = [(tag, rights, NO_ID) for tag, rights in least.items() if tag not in [entry[0] for entry in named]]
    give(file, *named, *rest)
    agrees_with_the_kernel(file, owner)


def agrees_with_the_kernel(file: Path, owner: Owner) -> None:
    """Tries it as that user."""
    for wanted, flag in ((READ, "-r"), (WRITE, "-w")):
        tried = subprocess.run(
            ["/usr/bin/test", flag, file], user=owner.uid, group=owner.gid, extra_groups=[], check=False, timeout=10
        )
        assert (obstacle(file, owner, wanted) is None) == (tried.returncode == 0)


@pytest.mark.parametrize("text", ["", "1", "root:root", "-1:1", "1:1:1", "1000:", "4294967295:1", "1:99999999999"])
def test_an_owner_is_two_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="is no owner: "):
        Owner.parse(text)
