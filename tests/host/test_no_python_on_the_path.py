"""While a call keeps the GIL of the pager's process, the pager does all of its work."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from actors import busy_process
from actors.lines import LineProcess
from actors.memory_file import PAGE, first_byte
from actors.peer import Peer

pytestmark = pytest.mark.needs("/dev/userfaultfd")

SIZE = 256 * PAGE


class Busy(LineProcess):
    """A pager in a Python process that keeps the GIL from the event `busy` until `let_go`."""

    def __init__(self, socket: Path, source: Path, *under: str) -> None:
        super().__init__([*under, sys.executable, busy_process.__file__, socket, source])

    def __enter__(self) -> Self:
        self.event("busy")
        return self

    def let_go(self) -> None:
        while self._read(0.0):
            pass
        assert self.seen("free") == [], "the GIL was held until now"
        assert self.child.stdin is not None
        self.child.stdin.write(b"x")
        self.child.stdin.flush()
        self.event("free")


def test_handshakes_faults_and_failures_go_on_while_the_gil_is_held(
    folder: Path, memory_file: Path, peer: Callable[[], Peer]
) -> None:
    socket = folder / "pager.sock"
    with memory_file.open("r+b") as writer, Busy(socket, memory_file) as busy:
        good, doomed, stranger = peer(), peer(), peer()
        good.map(SIZE)
        name = good.introduce(socket)
        busy.event("session-started", vm=name)
        assert good.read_all() == [first_byte(page) for page in range(256)]
        doomed.map(SIZE)
        name = doomed.introduce(socket)
        busy.event("session-started", vm=name)
        writer.truncate(SIZE // 2)
        doomed.touch(200)
        busy.event("failed", vm=name)
        assert doomed.finish() == -9
        busy.event("ended", vm=name)
        stranger.connect(socket)
        stranger.say("nonsense")
        busy.event("refused", pid=stranger.pid)
        busy.let_go()


@pytest.mark.needs_root
def test_a_stall_is_told_of_while_the_gil_is_held(folder: Path, memory_file: Path, peer: Callable[[], Peer]) -> None:
    socket, vm = folder / "pager.sock", peer()
    vm.map(SIZE)
    vm.ask("become", uid=65534)
    folder.chmod(0o755)
    with memory_file.open("r+b") as writer, Busy(socket, memory_file, "setpriv", "--bounding-set", "-kill") as busy:
        name = vm.introduce(socket)
        busy.event("session-started", vm=name)
        writer.truncate(SIZE // 2)
        vm.touch(200)  # its VM cannot be killed: the fault waits
        assert busy.event("stall", vm=name)["address"] == vm.hva + 200 * PAGE
        busy.let_go()
