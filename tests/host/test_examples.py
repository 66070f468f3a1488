"""The programs in examples/, run as a user runs them, with a real VM that verifies what it gets."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from actors.http_file import HttpFile, Manner, serving
from actors.lines import LineProcess
from latepage.kvm import Job, VmProcess

pytestmark = pytest.mark.needs("/dev/userfaultfd")

EXAMPLES = Path(__file__).parents[2] / "examples"
MEMORY = 16 << 20
PAGE = 4096
SYSTEM = 2 << 20
SEED = 7


class Example(LineProcess):
    """An example as a process; its log lines are its `lines`."""

    def __init__(self, folder: Path, name: str, *arguments: str | Path) -> None:
        self._stderr_path = folder / "stderr"
        super().__init__([sys.executable, EXAMPLES / name, *arguments], stderr_file=self._stderr_path.open("wb"))

    def said(self) -> str:
        return self._stderr_path.read_text()


@dataclass(frozen=True)
class Saved:
    """A VM that was filled and saved."""

    state: Path
    memory: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    files = Saved(folder / "vm.state", folder / "vm.mem")
    with VmProcess.create(Job("fill", seed=SEED), memory=MEMORY, vcpus=2, save=(files.state, files.memory)) as vm:
        vm.event("saved")
        assert vm.wait() == 0
    return files


@pytest.fixture
def example(folder: Path) -> Iterator[Callable[..., Example]]:
    """Starts an example, and waits until it listens."""
    with ExitStack() as stack:

        def start(name: str, *arguments: str | Path) -> Example:
            process = stack.enter_context(Example(folder, name, *arguments))
            process.event("listening")
            return process

        yield start


def verify(saved: Saved, socket: Path, pager: Example, name: str) -> None:
    """Restores a VM whose guest verifies every page, and the host every byte."""
    order = Job("verify", order="random", seed=1)
    with VmProcess.restore(saved.state, order, pager=socket, name=name, compare=True) as vm:
        assert vm.done().is_right
        assert vm.event("compared")["wrong_pages"] == 0
        assert vm.wait() == 0
    pager.event("ended", vm=name)
    assert pager.seen("failed") == []


def fails(saved: Saved, socket: Path, pager: Example, name: str) -> dict[str, Any]:
    """Restores a VM that will lack a page, and how it failed."""
    with VmProcess.restore(saved.state, Job("verify", order="random", seed=1), pager=socket, name=name) as vm:
        failed = pager.event("failed", vm=name)
        assert vm.process.wait(20) == -signal.SIGKILL
    return failed


def ends(pager: Example) -> None:
    """It ends as it was told to, without a word that is no event."""
    pager.signal(signal.SIGTERM)
    assert pager.finish() == 0
    assert pager.said() == ""


@pytest.fixture
def http(saved: Saved) -> Iterator[HttpFile]:
    """A server that holds the memory file."""
    with serving(saved.memory) as server:
        yield server


def test_memory_from_http_ranges_is_right(example: Callable[..., Example], folder: Path, saved: Saved, http: HttpFile) -> None:
    pager = example("http_ranges.py", folder / "s", http.url)
    for name in ("first", "second"):
        verify(saved, folder / "s", pager, name)
    assert http.requests > 0
    ends(pager)


@pytest.mark.parametrize(
    ("manner", "says"),
    [
        ("no ranges", "and the answer is 200, None"),
        ("another range", "and the answer is 206, bytes "),
        ("short", "bytes where"),
    ],
)
def test_a_server_that_answers_anything_else_is_not_believed(
    example: Callable[..., Example], folder: Path, saved: Saved, http: HttpFile, manner: Manner, says: str
) -> None:
    pager = example("http_ranges.py", folder / "s", http.url)
    http.manner = manner
    assert says in fails(saved, folder / "s", pager, "victim")["reason"]
    http.manner = "ranges"
    with VmProcess.restore(saved.state, Job("verify"), pager=folder / "s", name="next") as vm:
        assert vm.done().is_right
    pager.event("ended", vm="next")


def test_a_file_that_was_uploaded_anew_is_not_mixed_with_the_old_one(
    example: Callable[..., Example], folder: Path, saved: Saved, http: HttpFile
) -> None:
    pager = example("http_ranges.py", folder / "s", http.url)
    http.etag = '"second"'
    assert "the answer is 412" in fails(saved, folder / "s", pager, "victim")["reason"]


def test_encrypted_memory_is_right_and_what_was_changed_is_no_page(
    example: Callable[..., Example], folder: Path, saved: Saved
) -> None:
    pytest.importorskip("cryptography", reason="the extra `examples` is not installed")
    key, encrypted = folder / "key.bin", folder / "vm.enc"
    command: list[str | Path] = [sys.executable, EXAMPLES / "encrypted.py", "encrypt", key, saved.memory, encrypted]
    subprocess.run(command, check=True)
    assert key.stat().st_mode & 0o777 == 0o600
    assert encrypted.stat().st_size == MEMORY // PAGE * (PAGE + 16)
    assert saved.memory.read_bytes()[SYSTEM : SYSTEM + 8] not in encrypted.read_bytes()
    pager = example("encrypted.py", "serve", key, encrypted, folder / "s")
    verify(saved, folder / "s", pager, "right")
    sealed = bytearray(encrypted.read_bytes())
    sealed[(SYSTEM // PAGE + 300) * (PAGE + 16) + 100] ^= 1
    encrypted.write_bytes(sealed)
    failed = fails(saved, folder / "s", pager, "victim")
    assert failed["page"] == SYSTEM // PAGE + 300
    assert "InvalidTag" in failed["reason"]


def test_a_made_up_memory_is_what_the_guest_would_have_written(
    example: Callable[..., Example], folder: Path, saved: Saved
) -> None:
    (folder / "system.mem").write_bytes(saved.memory.read_bytes()[:SYSTEM])
    arguments = (folder / "system.mem", str(MEMORY >> 20), str(SEED))
    pager = example("made_up.py", folder / "s", *arguments)
    verify(saved, folder / "s", pager, "right")
    ends(pager)
    pager = example("made_up.py", folder / "s", *arguments, "300", "301")
    failed = fails(saved, folder / "s", pager, "victim")
    assert failed["page"] in (SYSTEM // PAGE + 300, SYSTEM // PAGE + 301)
    assert "is lost" in failed["reason"]


@pytest.mark.parametrize("example_file", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_a_screenful(example_file: Path) -> None:
    assert len(example_file.read_text().splitlines()) <= 75
