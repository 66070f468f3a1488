"""The demo, on a small VM: figures, a picture, and a word on what the guest was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("/dev/userfaultfd")

PNG = b"\x89PNG\r\n\x1a\n"


def demo(folder: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "latepage", "demo", "--memory", "16MiB", "--output", str(folder / "demo"), *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_the_demo_restores_three_ways_and_draws_a_picture(folder: Path) -> None:
    result = json.loads(demo(folder, "--json"))
    assert result["memory"] == 16 << 20
    assert [way["way"] for way in result["ways"]] == ["read in first", "mapped lazily", "through latepage"]
    for way in result["ways"]:
        assert way["guest"] == ("kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "threads")
        assert way["wrong_pages"] == 0
        assert 0 < way["first_instruction"] < way["tenth_verified"] < way["all_verified"]
    ours = result["ways"][-1]
    # On a slow day population has brought so small a memory before the guest touches any of it.
    assert ours["faults"] >= 0
    assert ours["bytes_moved"] >= (16 << 20) - (2 << 20)
    assert Path(result["picture"]).read_bytes().startswith(PNG)
    assert json.loads((folder / "demo" / "demo.json").read_text()) == result


def test_the_table_fits_eighty_columns_and_says_what_the_guest_was(folder: Path) -> None:
    table = demo(folder)
    assert "KVM" in table or "threads" in table
    assert all(len(line) <= 80 for line in table.splitlines() if "demo.png" not in line)
    assert "…" not in table
