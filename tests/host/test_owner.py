"""`--owner`: the socket is given to the user as whom the VMM runs, and to nobody else."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.memory_file import PAGE, first_byte
from actors.peer import Peer
from actors.serve import Serve
from latepage import Policy, PolicyError


@pytest.mark.needs_root
@pytest.mark.needs("/dev/userfaultfd")
def test_a_vmm_of_the_owner_is_served_and_one_of_another_user_is_not_let_in(
    serve: Callable[..., Serve], peer: Callable[[], Peer], folder: Path
) -> None:
    folder.chmod(0o755)
    pager, owner, stranger = serve("--owner", "23456:34567"), peer(), peer()
    status = pager.socket.lstat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (23456, 34567, 0o660)
    owner.map(256 * PAGE)
    owner.ask("become", uid=23456)
    owner.introduce(pager.socket)
    assert owner.read(3) == first_byte(3)
    stranger.ask("become", uid=65534)
    assert stranger.ask("connect", path=str(pager.socket))["error"] == errno.EACCES


@pytest.mark.needs_root
def test_a_folder_that_the_owner_cannot_pass_is_told_at_the_start(serve: Callable[..., Serve], folder: Path) -> None:
    # No error: a jailed VMM does not see what is above its jail.
    folder.chmod(0o700)
    pager = serve("--owner", "23456:34567")
    assert f"unless it is jailed, user 23456 cannot connect: it may not enter {folder}" in pager.said()


@pytest.mark.needs_root
def test_who_may_not_give_files_away_is_told_so_and_leaves_no_socket(folder: Path, memory_file: Path) -> None:
    folder.chmod(0o777)
    memory_file.chmod(0o644)
    code = f"""
import os
from latepage import *
os.setresuid(65534, 65534, 65534)
try:
    Pager().listen({str(folder / "pager.sock")!r}, open_source({str(memory_file)!r}), Policy(owner=(0, 0)))
except ListenError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert "cannot be given to 0:0" in said.stdout, said.stderr
    assert "CAP_CHOWN" in said.stdout
    assert not (folder / "pager.sock").exists()


@pytest.mark.parametrize("owner", [(1,), (1, 2, 3), (-1, 0), (0, 1 << 32), ("root", "root")], ids=str)
def test_an_owner_that_is_no_user_and_group_is_refused(owner: tuple[int, int]) -> None:
    with pytest.raises(PolicyError, match="owner is"):
        Policy(owner=owner)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may give files away")
def test_a_pager_that_is_not_root_says_that_it_takes_root(serve: Callable[..., Serve]) -> None:
    pager = serve("--owner", "0:0", listens=False)
    assert pager.finish() == 1
    assert "takes root (CAP_CHOWN)" in pager.said()
