"""`latepage scan`, and what `serve` makes of zero maps."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.peer import Peer
from actors.serve import Serve
from latepage import zero_maps

PAGE = 4096


def scan(*arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "latepage", "scan", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment, timeout=60)


@pytest.fixture
def sparse(folder: Path) -> Path:
    """A memory file: two pages of data, six of zeros that are data, a hole of eight."""
    path = folder / "sparse.mem"
    with path.open("wb") as file:
        file.write(b"\1" * 2 * PAGE + bytes(6 * PAGE))
        file.truncate(16 * PAGE)
        os.fsync(file.fileno())
    return path


def test_a_scan_counts_holes_and_zero_pages_and_says_why_there_is_no_map_yet(sparse: Path, tmp_path: Path) -> None:
    done = scan(sparse, "--json", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["pages"], said["holes"], said["zeros"]) == (16, 8, 6)
    assert (said["map"] is None) == (said["why"] is not None)
    if said["map"] is None:
        assert said["why"] in done.stderr


def test_a_map_of_a_file_that_has_settled_is_private_and_where_it_is_said_to_be(tmp_path: Path) -> None:
    # A file that is older than this test: nobody can set the time of its last change back.
    old = Path(sys.executable).resolve()
    done = scan(old, "--json", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    if said["map"] is None:
        pytest.skip(said["why"])
    place = Path(said["map"])
    assert place.parent == tmp_path / "latepage" / "zero"
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    pages = old.stat().st_size // PAGE
    words = -(-pages // 64)
    content = place.read_bytes()
    assert content[:8] == b"lpzeros\n"
    assert len(content) == 8 * (10 + 2 * words)
    # Damaged, it is told of and made again.
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = scan(old, "--json", XDG_CACHE_HOME=str(tmp_path))
    assert "checksum" in again.stderr
    assert place.read_bytes() == content


def test_a_cache_folder_that_cannot_be_written_is_a_warning_and_no_failure(sparse: Path, tmp_path: Path) -> None:
    (tmp_path / "latepage").write_text("a file where a folder should be")
    done = scan(sparse, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0
    assert "no zero map was written" in done.stderr
    assert "in holes" in done.stdout


def test_a_file_that_is_none_is_an_error_in_one_line(tmp_path: Path) -> None:
    done = scan(tmp_path / "none.mem")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no such file" in done.stderr


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "/x"}, "/x/latepage/zero"),
        ({"CACHE_DIRECTORY": "/y:/z", "XDG_CACHE_HOME": "/x"}, "/y/latepage/zero"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/latepage/zero"),
    ],
)
def test_the_cache_folder_is_the_users(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE_DIRECTORY", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(zero_maps.folder()) == expected


def test_without_home_the_user_database_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE_DIRECTORY", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    found = zero_maps.folder()
    assert found is None or found.is_absolute()


@pytest.mark.needs("/dev/userfaultfd")
@pytest.mark.parametrize("zero_map", ["auto", "off"])
def test_zero_pages_are_zero_with_a_map_and_without(
    serve: Callable[..., Serve], peer: Callable[[], Peer], sparse: Path, zero_map: str
) -> None:
    pager, vm = serve("--zero-map", zero_map, source=sparse), peer()
    vm.map(16 * PAGE)
    vm.introduce(pager.socket)
    assert vm.read_all() == [1, 1] + 14 * [0]
