"""What `latepage serve` shows a person: its VMs and how far each is, on a terminal."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.memory_file import PAGE
from actors.peer import Peer

pytestmark = pytest.mark.needs("/dev/userfaultfd")


def test_a_terminal_shows_each_vm_its_progress_and_the_end(folder: Path, memory_file: Path, peer: Callable[[], Peer]) -> None:
    try:
        terminal, slave = pty.openpty()
    except OSError as error:
        pytest.skip(f"no terminal is to be had: {error}")
    command = [sys.executable, "-m", "latepage", "serve", str(folder / "pager.sock"), str(memory_file)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    shown = b""

    def until(wanted: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + 20
        while wanted not in shown and time.monotonic() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096)
        assert wanted in shown, shown.decode(errors="replace")

    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as pager:
        try:
            until(b"no VM yet")
            vm = peer()
            vm.map(256 * PAGE)
            vm.introduce(folder / "pager.sock")
            until(f"vm-{vm.pid}".encode())
            vm.read_all()
            until(b"100%")
            until(b"populated")
            pager.send_signal(signal.SIGTERM)
            until(b"drained")
            assert pager.wait(20) == 0
        finally:
            pager.kill()
            os.close(slave)
            os.close(terminal)
