"""Commands whose caller has closed their standard streams (`>&-`), as some supervisors and cron jobs do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.lines import PATIENCE

pytestmark = pytest.mark.needs("/dev/userfaultfd")

STREAMS = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]


def shell(closed: str, *arguments: str | Path) -> list[str]:
    """What starts a command with these streams closed."""
    return ["sh", "-c", f'exec "$0" -m latepage "$@" {closed}', sys.executable, *map(str, arguments)]


def run(closed: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """A command of which the shell has closed these streams; what was closed says nothing."""
    return subprocess.run(shell(closed, *arguments), capture_output=True, text=True, check=False, timeout=PATIENCE)


@pytest.mark.parametrize("closed", STREAMS)
def test_a_command_does_what_it_does_and_ends_as_it_would(closed: str) -> None:
    done = run(closed, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", ""))


@pytest.mark.parametrize("closed", STREAMS)
@pytest.mark.parametrize("json", [(), ("--json",)], ids=["", "json"])
@pytest.mark.parametrize("command", ["serve", "restore"])
def test_what_goes_wrong_is_told_where_that_is_possible(
    command: str, closed: str, json: tuple[str, ...], folder: Path, memory_file: Path
) -> None:
    # Before it listens, but after it has looked at its streams.
    (folder / "taken").write_text("precious")
    paths: list[str | Path] = [folder / "taken", memory_file]
    if command == "restore":
        state = folder / "vm.state"
        state.write_bytes(bytes(100))
        paths = ["--state", state, "--memory", memory_file, "--firecracker", "/bin/true", "--socket", folder / "taken"]
    done = run(closed, command, *paths, *json)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    if "2>&-" not in closed:
        assert "there is a file of that name" in done.stderr


@pytest.mark.parametrize("closed", STREAMS)
def test_a_pager_lives_and_ends_as_ever(closed: str, folder: Path, memory_file: Path) -> None:
    socket = folder / "pager.sock"
    child = subprocess.Popen(shell(closed, "serve", socket, memory_file), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while not socket.exists() and child.poll() is None and time.monotonic() < end:
            os.sched_yield()
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE) == 0
    finally:
        child.kill()
        child.wait()
