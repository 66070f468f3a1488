"""The command line: what it takes, and how it says no."""

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
    assert all(command in shown.stdout for command in ("serve", "vm", "demo"))


def test_help_of_serve_explains_every_flag() -> None:
    shown = run("serve", "--help").stdout
    for flag in ("populate", "on-missing", "mode", "allow-uid", "stall-warning", "handshake-timeout", "detach-when-full", "json"):
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
    assert "latepage:" in said.stderr
