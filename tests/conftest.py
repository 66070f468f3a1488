"""What all tests share: memory files, the processes that play, and skips that say what a machine lacks."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from actors.memory_file import write_memory_file
from actors.peer import Peer
from actors.serve import Serve


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own() -> Iterator[None]:
    """No test reads or writes what the user has kept of his own memory files."""
    with tempfile.TemporaryDirectory(prefix="latepage-cache-") as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", name)
        yield


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: a Unix socket's has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="latepage-") as name:
        yield Path(name)


@pytest.fixture
def memory_file(folder: Path) -> Path:
    """A memory file of 256 pages."""
    return write_memory_file(folder / "guest.mem", 256)


ServeFactory = Callable[..., Serve]


@pytest.fixture
def serve(folder: Path, memory_file: Path) -> Iterator[ServeFactory]:
    """Starts `latepage serve` with flags, on `memory_file` unless told otherwise, and waits until it listens."""
    with ExitStack() as stack:

        def start(*flags: str, source: Path = memory_file, listens: bool = True) -> Serve:
            process = stack.enter_context(Serve(folder / "pager.sock", source, *flags))
            if listens:
                process.event("listening")
            return process

        yield start


@pytest.fixture
def peer() -> Iterator[Callable[[], Peer]]:
    """Starts a peer process."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Peer())


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    for name in request.node.iter_markers("needs"):
        for path in name.args:
            if not os.access(path, os.R_OK | os.W_OK):
                pytest.skip(f"no access to {path}")
    if request.node.get_closest_marker("needs_root") and os.geteuid() != 0:
        pytest.skip("needs root")


def pytest_configure(config: pytest.Config) -> None:
    """Marks for what a machine may lack."""
    config.addinivalue_line("markers", "needs(path, ...): skip unless these can be read and written")
    config.addinivalue_line("markers", "needs_root: skip unless run as root")
