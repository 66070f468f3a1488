"""What lies at the socket's path decides: only nothing, or a socket that nobody listens at, is replaced."""

import socket
import stat
from collections.abc import Callable
from pathlib import Path

from actors.serve import Serve


def refusal(pager: Serve) -> str:
    assert pager.finish() == 1
    assert pager.seen("listening") == []
    return pager.said()


def test_a_living_socket_is_not_taken_away_from_its_owner(serve: Callable[..., Serve], folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(folder / "pager.sock"))
        owner.listen()
        assert "pager.sock" in refusal(serve(listens=False))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(folder / "pager.sock"))


def test_a_stale_socket_is_replaced(serve: Callable[..., Serve], folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(folder / "pager.sock"))
    serve()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "pager.sock"))


def test_a_file_is_left_alone(serve: Callable[..., Serve], folder: Path) -> None:
    (folder / "pager.sock").write_text("precious")
    assert "pager.sock" in refusal(serve(listens=False))
    assert (folder / "pager.sock").read_text() == "precious"


def test_a_path_that_is_too_long_is_refused_with_the_limit(folder: Path, memory_file: Path) -> None:
    with Serve(folder / ("long" * 30), memory_file, stderr_path=folder / "stderr") as pager:
        assert "107" in refusal(pager)


def test_a_folder_that_is_not_there_is_named(folder: Path, memory_file: Path) -> None:
    with Serve(folder / "nowhere" / "pager.sock", memory_file, stderr_path=folder / "stderr") as pager:
        assert "nowhere" in refusal(pager)


def test_the_socket_has_the_mode_that_was_asked_for(serve: Callable[..., Serve], folder: Path) -> None:
    serve("--mode", "0600")
    assert stat.S_IMODE((folder / "pager.sock").stat().st_mode) == 0o600


def test_the_socket_is_gone_after_a_drain(serve: Callable[..., Serve], folder: Path) -> None:
    pager = serve()
    pager.child.terminate()
    assert pager.finish() == 0
    assert not (folder / "pager.sock").exists()
