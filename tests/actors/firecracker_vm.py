"""A real Firecracker with the guest of `guest/` in it: its API, what its guest says, and what its process holds."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from actors.lines import Line, LineProcess
from latepage.firecracker import Client, HugePages, MemoryBackend, RestoredVm
from latepage.firecracker.calls import Call

MIB = 1 << 20

SPELL = 60.0
"""Seconds that a guest has for a job: where KVM itself is emulated, it does a million instructions a second."""


@dataclass(frozen=True)
class Snapshot:
    """A saved VM, and how many pages its guest checks."""

    state: Path
    memory: Path
    pages: int


def find_program(name: str, variable: str, beside: Path | None = None) -> tuple[Path | None, str]:
    """A program of Firecracker's to test with, or why there is none."""
    named = os.environ.get(variable)
    if named:
        return (Path(named), "") if os.access(named, os.X_OK) else (None, f"{variable} names {named}: nothing to run there")
    near = None if beside is None else shutil.which(name, path=beside.parent)
    found = near or shutil.which(name)
    return (Path(found), "") if found else (None, f"no {name} on PATH, and {variable} names none")


def is_static(program: Path) -> bool:
    """Whether it needs no dynamic loader, as Firecracker's own builds (for musl) do not."""
    return b"/ld-" not in program.read_bytes()[:4096]


def seccomp_modes(pid: int) -> dict[str, str]:
    """The seccomp mode of each thread of a process, by the thread's name: 0 is none, 2 a filter."""
    modes = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        modes[status["Name"]] = status["Seccomp"]
    return modes


class FirecrackerVm(LineProcess):
    """A Firecracker process; the lines of its guest are its `lines`.

    Attributes:
        api: a client of its API.
        log: what it logs.
    """

    def __init__(self, firecracker: Path, folder: Path, name: str = "vm") -> None:
        self.api_sock = folder / f"{name}.api"
        self.log = folder / f"{name}.log"
        self._first_words = b""
        super().__init__([firecracker, "--id", name, "--api-sock", self.api_sock])
        self.api = Client(self.api_sock, timeout=SPELL)
        try:
            self._until_the_api_answers()
            # From here on only the guest speaks on standard output: half a line of it may stand there at any time.
            # Firecracker 1.12 does not make the file that it logs to.
            self.log.touch()
            self.api.call(Call("PUT", "/logger", {"log_path": str(self.log), "level": "Info"}))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.api.close()
        super().__exit__()
        self.api_sock.unlink(missing_ok=True)

    def boot(self, guest: Path, memory: int, arguments: str = "none", huge_pages: HugePages | None = None) -> None:
        """Boots the guest with so many bytes of memory and a balloon, and waits until it has filled them."""
        self.api.machine(vcpus=1, memory=memory, huge_pages=huge_pages)
        self.api.boot_source(guest, arguments)
        self.api.balloon(0, deflate_on_oom=False)
        self.api.start()
        assert self.event("ready", SPELL)["balloon"] == 1
        self.event("filled", SPELL)

    def load(self, state: Path, pager: Path, *, resume: bool = True) -> None:
        """Restores a snapshot whose memory a pager brings."""
        self.api.load_snapshot(state, MemoryBackend("Uffd", str(pager)), resume=resume)

    def save(self, state: Path, memory: Path) -> None:
        """Pauses the VM and takes a full snapshot."""
        self.api.pause()
        self.api.create_snapshot(state, memory)

    def balloon(self, size: int) -> Line:
        """Has the balloon be of that size in bytes, and waits until it is; what the guest says of it."""
        self.api.set_balloon(size)

        def there(line: Line) -> bool:
            return line["event"] in ("inflated", "deflated") and line["given"] == size >> 12

        return self.wait_for(there, f"a balloon of {size >> 20} MiB", SPELL)

    def tell(self, word: str) -> None:
        """A line for the guest."""
        assert self.child.stdin is not None
        self.child.stdin.write(word.encode() + b"\n")
        self.child.stdin.flush()

    def ask(self, word: str, event: str) -> Line:
        """A line for the guest, and its answer."""
        self.tell(word)
        return self.event(event, SPELL)

    def verify(self, order: str = "random") -> Line:
        """Has the guest check its memory; what it found, which is nothing wrong."""
        found = self.ask(f"verify {order}", "verified")
        assert found["wrong"] == 0, found
        return found

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else self._first_words.decode(errors="replace")

    def _until_the_api_answers(self) -> None:
        assert self.child.stdout is not None
        for line in iter(self.child.stdout.readline, b""):
            self._first_words += line
            if b"API server started" in line:
                return
        raise AssertionError(f"Firecracker ended before its API was there:\n{self.said()}")


QUIET = ("--level", "Error")
"""Arguments for a Firecracker that says nothing on standard output, where its guest speaks, unless something is wrong."""


class RestoredGuest:
    """The guest in a VM that `latepage.firecracker.restore` has restored."""

    def __init__(self, vm: RestoredVm) -> None:
        self.vm = vm

    def ask(self, word: str, event: str) -> Line:
        """A line for the guest, and its answer."""
        console = self.vm.process.console
        assert console is not None
        start = console.end
        self.vm.process.send(f"{word}\n")
        line: Line = json.loads(console.wait_for(f'{{"event":"{event}"', SPELL, start))
        return line

    def verify(self, order: str = "random") -> Line:
        """Has the guest check its memory; what it found, which is nothing wrong."""
        found = self.ask(f"verify {order}", "verified")
        assert found["wrong"] == 0, found
        return found

    def balloon(self, size: int) -> Line:
        """Has the balloon be of that size in bytes, and waits until it is; what the guest says of it."""
        console = self.vm.process.console
        assert console is not None
        start = console.end
        with self.vm.client() as api:
            api.set_balloon(size)
        # Before the comma is the last number of the line, or not.
        line: Line = json.loads(console.wait_for(f'"given":{size >> 12}', SPELL, start))
        return line
