"""What is known of Firecracker's versions: fields of its API, formats of its state files."""

import os
from pathlib import Path

import pytest

from actors.faulty_firecracker import write_state_file
from latepage import FirecrackerError
from latepage.firecracker import MemoryBackend, StateFile, Version, calls
from latepage.firecracker.explain import explanation
from latepage.firecracker.version import require

LOAD = "PUT /snapshot/load"
UFFD = MemoryBackend("Uffd", "/p.sock")
SAYS = "Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file: Invalid data version: 8.0.0"


@pytest.mark.parametrize(
    ("options", "field", "since"),
    [
        ({}, "mem_backend", Version(1, 1)),
        ({"network": {"eth0": "tap1"}}, "network_overrides", Version(1, 12)),
        ({"track_dirty_pages": True}, "track_dirty_pages", Version(1, 13)),
        ({"vsock": "/v.sock"}, "vsock_override", Version(1, 16)),
        ({"clock_realtime": True}, "clock_realtime", Version(1, 16)),
        ({"huge_pages": "2M"}, "huge_pages", Version(1, 17)),
    ],
)
def test_a_field_is_refused_until_the_version_that_has_it(options: dict[str, object], field: str, since: Version) -> None:
    call = calls.load("/s", UFFD, **options)  # type: ignore[arg-type]
    assert field in call.body
    require(since, str(call), call.body)
    before = Version(since.major, since.minor - 1, 9)
    with pytest.raises(FirecrackerError, match=f"Firecracker {before} has no {field} in {LOAD}; {since} has it"):
        require(before, str(call), call.body)


def test_a_plain_load_is_understood_by_the_oldest_that_takes_a_pager() -> None:
    call = calls.load("/s", UFFD)
    require(Version(1, 1), str(call), call.body)
    assert set(call.body) == {"snapshot_path", "mem_backend"}


def test_a_value_can_be_newer_than_its_field() -> None:
    for pages, since in (("2M", Version(1, 7)), ("Transparent", Version(1, 17))):
        call = calls.machine(vcpus=1, memory=1 << 20, huge_pages=pages)  # type: ignore[arg-type]
        require(since, str(call), call.body)
        with pytest.raises(FirecrackerError, match="huge_pages"):
            require(Version(since.major, since.minor - 1), str(call), call.body)


@pytest.mark.parametrize("text", ["", "firecracker", "1", "one.two"])
def test_what_is_no_version_is_said_to_be_none(text: str) -> None:
    with pytest.raises(FirecrackerError, match="no version of Firecracker"):
        Version.parse(text)


@pytest.mark.parametrize(
    ("version", "made_by"), [("11.0.0", "1.17"), ("10.0.0", "1.16"), ("8.0.0", "1.13 or 1.14"), ("2.0.0", "1.8")]
)
def test_a_state_file_says_its_format(tmp_path: Path, version: str, made_by: str) -> None:
    state = StateFile.open(write_state_file(tmp_path / "s", version))
    assert state.format == version
    assert f"Firecracker {made_by}" in state.made_by


def test_a_state_file_from_before_formats_had_a_version_is_known_as_that(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(bytes.fromhex("0500648684191007") + bytes(range(200)))
    state = StateFile.open(path)
    assert state.format is None
    assert "1.6 or older" in state.made_by


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (b"", "does not begin as Firecracker's state files do"),
        (bytes(4096), "is it the memory file"),
        (bytes.fromhex("0000aaaa84191007") + bytes(100), "of a VM of aarch64"),
        (bytes.fromhex("000000aaaa84191007") + bytes(100), "of a VM of aarch64"),
    ],
)
def test_what_is_no_state_file_of_ours_is_left_to_firecracker_and_explained(tmp_path: Path, contents: bytes, says: str) -> None:
    path = tmp_path / "s"
    path.write_bytes(contents)
    words = explanation(FirecrackerError("no", fault_message=SAYS), StateFile.open(path), Version(1, 17), None)
    assert words is not None
    assert says in words


@pytest.mark.parametrize("length", range(1, 40))
def test_a_state_file_that_was_cut_off_is_no_riddle(tmp_path: Path, length: int) -> None:
    for version in ("11.0.0", "10.0.0"):
        path = write_state_file(tmp_path / "s", version)
        path.write_bytes(path.read_bytes()[:length])
        assert StateFile.open(path).format in (None, version)


def test_a_state_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FirecrackerError, match="none: No such file"):
        StateFile.open(tmp_path / "none")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(FirecrackerError, match="no regular file"):
            StateFile.open(path)


def test_our_words_stand_above_those_about_another_format(tmp_path: Path) -> None:
    state = StateFile.open(write_state_file(tmp_path / "s", "8.0.0"))
    words = explanation(FirecrackerError("no", fault_message=SAYS), state, Version(1, 17), None)
    assert words is not None
    assert "was written in format 8.0.0 (Firecracker 1.13 or 1.14), and Firecracker 1.17.0 cannot load it" in words


def test_a_damaged_state_file_of_the_right_format_is_called_that(tmp_path: Path) -> None:
    state = StateFile.open(write_state_file(tmp_path / "s", "11.0.0"))
    words = explanation(FirecrackerError("no", fault_message=SAYS.replace("data version", "CRC64")), state, Version(1, 17), None)
    assert words is not None
    assert "damaged" in words


def test_where_there_is_nothing_to_add_nothing_is_added(tmp_path: Path) -> None:
    state = StateFile.open(write_state_file(tmp_path / "s"))
    assert (
        explanation(FirecrackerError("no", fault_message="Load snapshot error: tap7 is busy"), state, Version(1, 17), None)
        is None
    )
