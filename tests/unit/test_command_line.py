"""The command line: what it takes, and how it says no."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "latepage", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_help_names_every_command() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert all(
        command in shown.stdout for command in ("serve", "restore", "check", "vm", "top", "trace", "scan", "bench", "demo")
    )


def test_help_of_serve_explains_every_flag() -> None:
    shown = run("serve", "--help").stdout
    listed = ("populate", "on-missing", "mode", "owner", "allow-uid", "stall-warning", "handshake-timeout", "detach-when-full")
    for flag in (*listed, "json"):
        assert f"--{flag}" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve",),
        ("serve", "pager.sock"),
        ("serve", "pager.sock", "guest.mem", "--populate", "later"),
        ("serve", "pager.sock", "guest.mem", "--mode", "rw"),
        ("serve", "pager.sock", "guest.mem", "--fault-around", "64kb"),
        ("serve", "pager.sock", "guest.mem", "--no-such-flag"),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_what_is_not_understood_ends_with_2_and_says_why(arguments: tuple[str, ...]) -> None:
    said = run(*arguments)
    assert said.returncode == 2
    assert said.stderr


@pytest.mark.parametrize("flag", [("--stall-warning", "0"), ("--handshake-timeout", "-1")], ids=" ".join)
def test_a_policy_that_makes_no_sense_ends_with_2_and_says_what_would(flag: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "guest.mem").write_bytes(bytes(4096))
    said = run("serve", str(tmp_path / "pager.sock"), str(tmp_path / "guest.mem"), *flag)
    assert said.returncode == 2
    assert f"latepage: {flag[0]} is " in said.stderr


VM = ("run", "restore", "save", "pause", "resume", "discard", "job", "stop", "compare", "report", "quit")


COMMANDS = ("serve", "restore", "check", "scan", "bench", "demo", "top", "trace", "vm")


@pytest.mark.parametrize("command", [*((name,) for name in COMMANDS), *(("vm", name) for name in VM)], ids=" ".join)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    assert run(*command, "--help").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("demo", "--memory", "1"), "multiple of 2MiB"),
        (("demo", "--output", "{}/file"), "file is no folder"),
        (("vm", "run", "--save", "{}/x", "{}/x"), "must be two files"),
        (("vm", "run", "--save", "{}/x", "{}/none/y"), "make it first"),
        (("vm", "run", "--fill", "-3"), "--fill is -3"),
        (("vm", "restore", "{}/x", "--read", "{}/y", "--handshake", "firecracker"), "with --pager only"),
        (("serve", "{}/pager.sock", "{}/file", "--fault-around", "3"), "multiple of 4 KiB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_work_is_refused_before_anything_is_made(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    said = run(*(argument.replace("{}", str(tmp_path)) for argument in arguments))
    assert said.returncode == 2
    assert says in said.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_source_is_named_for_what_it_is() -> None:
    assert "path of a memory file" in run("serve", "pager.sock", "").stderr


def test_a_restore_says_which_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    missing = run("vm", "restore", str(tmp_path / "none"), "--map", str(tmp_path / "state"))
    assert (missing.returncode, "no state file" in missing.stderr) == (1, True)
    missing = run("vm", "restore", str(tmp_path / "state"), "--map", str(tmp_path / "none"))
    assert (missing.returncode, "no memory file" in missing.stderr) == (1, True)


def test_a_reader_that_has_had_enough_ends_it_without_a_word(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "latepage", "check", "--json"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "latepage", "check", "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "latepage: what was to be told could not be written: No space left on device\n"
