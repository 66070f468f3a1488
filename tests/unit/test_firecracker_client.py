"""The client of Firecracker's API, in both its forms: what it sends, and what it makes of what comes back."""

import asyncio
import inspect
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latepage import FirecrackerError, PolicyError
from latepage.firecracker import AsyncClient, Client, MemoryBackend, Version

Answer = tuple[int, object]


class Api:
    """An API socket that answers as a test says, and keeps what was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer | bytes] = {}
        self.asked: list[tuple[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                connection = self._socket.accept()[0]
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                while self._serve(connection, lines):
                    pass

    def _serve(self, connection: socket.socket, lines: Any) -> bool:
        call = b" ".join(lines.readline().split()[:2]).decode()
        if not call:
            return False
        length = 0
        while (line := lines.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        self.asked.append((call, json.loads(lines.read(length)) if length else None))
        answer = self.answers.get(call, (204, None))
        if isinstance(answer, bytes):
            connection.sendall(answer)
            return False
        body = b"" if answer[1] is None else json.dumps(answer[1]).encode()
        connection.sendall(f"HTTP/1.1 {answer[0]} \r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return True


@pytest.fixture
def api(folder: Path) -> Iterator[Api]:
    one = Api(folder / "api.sock")
    one.answers["GET /version"] = (200, {"firecracker_version": "1.17.0-dev"})
    yield one
    one.close()


def sync_ask(path: Path, what: Callable[[Any], Any]) -> Any:
    with Client(path, timeout=10) as client:
        return what(client)


def async_ask(path: Path, what: Callable[[Any], Any]) -> Any:
    async def ask() -> Any:
        async with AsyncClient(path, timeout=10) as client:
            return await what(client)

    return asyncio.run(ask())


Ask = Callable[[Path, Callable[[Any], Any]], Any]
both = pytest.mark.parametrize("ask", [sync_ask, async_ask], ids=["sync", "async"])


@both
def test_sizes_that_firecracker_cannot_have_are_refused_and_not_cut(api: Api, ask: Ask) -> None:
    with pytest.raises(PolicyError, match="whole MiB"):
        ask(api.path, lambda client: client.set_balloon((64 << 20) + 4096))
    assert api.asked == []


@both
def test_calls_go_out_as_firecracker_wants_them(api: Api, ask: Ask) -> None:
    ask(api.path, lambda client: client.load_snapshot("/s", MemoryBackend("Uffd", "/p.sock"), network={"eth0": "tap7"}))
    ask(api.path, lambda client: client.pause())
    ask(api.path, lambda client: client.create_snapshot(Path("/s"), Path("/m"), diff=True))
    ask(api.path, lambda client: client.resume())
    ask(api.path, lambda client: client.set_balloon(64 << 20))
    backend = {"backend_type": "Uffd", "backend_path": "/p.sock"}
    assert [asked for asked in api.asked if asked[0] != "GET /version"] == [
        (
            "PUT /snapshot/load",
            {
                "snapshot_path": "/s",
                "mem_backend": backend,
                "network_overrides": [{"iface_id": "eth0", "host_dev_name": "tap7"}],
            },
        ),
        ("PATCH /vm", {"state": "Paused"}),
        ("PUT /snapshot/create", {"snapshot_type": "Diff", "snapshot_path": "/s", "mem_file_path": "/m"}),
        ("PATCH /vm", {"state": "Resumed"}),
        ("PATCH /balloon", {"amount_mib": 64}),
    ]


@both
def test_the_version_is_asked_only_where_it_matters_and_once(api: Api, ask: Ask) -> None:
    ask(api.path, lambda client: client.pause())
    assert [call for call, _ in api.asked] == ["PATCH /vm"]
    assert ask(api.path, lambda client: client.version()) == Version(1, 17)


@both
def test_what_its_version_does_not_know_is_not_sent(api: Api, ask: Ask) -> None:
    api.answers["GET /version"] = (200, {"firecracker_version": "1.11.0"})
    with pytest.raises(FirecrackerError, match=r"Firecracker 1\.11\.0 has no network_overrides .* 1\.12\.0 has it"):
        ask(api.path, lambda client: client.load_snapshot("/s", MemoryBackend("Uffd", "/p"), network={"eth0": "tap7"}))
    assert [call for call, _ in api.asked] == ["GET /version"]


@both
def test_the_instance_says_who_it_is(api: Api, ask: Ask) -> None:
    api.answers["GET /"] = (200, {"id": "vm-1", "state": "Paused", "vmm_version": "1.9.1", "app_name": "Firecracker"})
    info = ask(api.path, lambda client: client.info())
    assert (info.id, info.state, info.version) == ("vm-1", "Paused", Version(1, 9, 1))


@both
def test_firecrackers_own_words_are_passed_on_whole(api: Api, ask: Ask) -> None:
    words = "The requested operation is not supported in this state: " + "x" * 5000
    api.answers["PATCH /vm"] = (400, {"fault_message": words})
    with pytest.raises(FirecrackerError) as caught:
        ask(api.path, lambda client: client.pause())
    assert (caught.value.status, caught.value.fault_message, caught.value.call) == (400, words, "PATCH /vm")
    assert words in str(caught.value)


@both
@pytest.mark.parametrize("body", [{"error": "x"}, ["x"], "x", 7, None], ids=str)
def test_an_error_of_another_shape_is_passed_on_as_it_is(api: Api, ask: Ask, body: object) -> None:
    api.answers["PATCH /vm"] = (500, body)
    with pytest.raises(FirecrackerError) as caught:
        ask(api.path, lambda client: client.pause())
    assert caught.value.status == 500


@both
@pytest.mark.parametrize("version", [{}, {"firecracker_version": 7}, {"firecracker_version": "new"}, ["1.0.0"], None], ids=str)
def test_what_is_no_firecracker_is_said_to_be_none(api: Api, ask: Ask, version: object) -> None:
    api.answers["GET /version"] = (200, version)
    with pytest.raises(FirecrackerError, match=r"is it Firecracker|no version of Firecracker"):
        ask(api.path, lambda client: client.version())


@both
@pytest.mark.parametrize("said", [b"", b"SSH-2.0-OpenSSH_9.9\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"], ids=str)
def test_an_answer_that_is_none_names_the_call(api: Api, ask: Ask, said: bytes) -> None:
    api.answers["PATCH /vm"] = said
    with pytest.raises(FirecrackerError, match="no answer to PATCH /vm"):
        ask(api.path, lambda client: client.pause())


@both
def test_where_nobody_listens_the_path_is_named(folder: Path, ask: Ask) -> None:
    with pytest.raises(FirecrackerError, match=r"none\.sock: No such file or directory; does a Firecracker") as caught:
        ask(folder / "none.sock", lambda client: client.info())
    assert (caught.value.call, caught.value.errno) == ("connect", 2)


def test_both_clients_can_do_the_same_to_a_vm() -> None:
    boot = {"machine", "boot_source", "balloon", "start"}
    methods = {name for name in dir(Client) if not name.startswith("_")} - boot
    assert methods == {name for name in dir(AsyncClient) if not name.startswith("_")}
    for name in methods:
        ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (Client, AsyncClient))
        assert list(ours) == list(theirs)
