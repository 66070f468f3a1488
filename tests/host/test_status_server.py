"""The status server: what it answers, whom it refuses, that nobody holds it up, and that nothing of it is left."""

import errno
import http.client
import json
import os
import signal
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.memory_file import PAGE
from actors.pager_stand_in import PagerStandIn, SessionStandIn
from actors.peer import Peer
from actors.serve import Serve
from latepage import ListenError, Pager, Policy, open_source
from latepage.events import Ended, Event, SessionStarted
from latepage.observe import status_server
from latepage.observe.address import TcpAddress, UnixAddress
from latepage.observe.status_server import MOST_CONNECTIONS, StatusServer

LOCAL = "127.0.0.1:0"

Answer = tuple[int, str, bytes]


def connect(server: StatusServer) -> socket.socket:
    """A connection that has said nothing yet."""
    address = server.address
    if isinstance(address, TcpAddress):
        return socket.create_connection((address.host or "localhost", address.port), timeout=20)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(20)
    made.connect(address.path)
    return made


def ask(server: StatusServer, path: str, method: str = "GET", **headers: str) -> Answer:
    """One question: status, content type, content."""
    with connect(server) as client:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = client
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers["Content-Type"], content


def said_to(server: StatusServer, request: bytes) -> bytes:
    """What a client gets that says just this."""
    with connect(server) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        said = b""
        while part := client.recv(65_536):
            said += part
        return said


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.fixture
def pager() -> PagerStandIn:
    return PagerStandIn([SessionStandIn("vm-7", total=8, present=2)])


@pytest.fixture
def server(pager: PagerStandIn) -> Iterator[StatusServer]:
    with StatusServer(pager.as_pager(), LOCAL) as server:
        yield server


# What it answers.


def test_metrics_come_as_text_or_as_openmetrics(server: StatusServer) -> None:
    status, kind, content = ask(server, "/metrics")
    assert (status, kind.split(";")[0]) == (200, "text/plain")
    assert b"\nlatepage_faults_total 0.0\n" in content
    status, kind, content = ask(server, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert (status, kind.split(";")[0]) == (200, "application/openmetrics-text")
    assert content.endswith(b"# EOF\n")


def test_a_head_has_no_content_and_the_length_of_it(server: StatusServer) -> None:
    said = said_to(server, b"HEAD /healthz HTTP/1.1\r\n\r\n")
    assert said.startswith(b"HTTP/1.0 200 ")
    assert b"Content-Length: 3\r\n" in said
    assert said.endswith(b"\r\n\r\n")


def test_it_is_ready_while_vms_are_taken(folder: Path, memory_file: Path) -> None:
    with Pager() as pager, StatusServer(pager, LOCAL) as server:
        assert ask(server, "/healthz")[0] == 200
        assert ask(server, "/readyz")[::2] == (503, b"not listening yet\n")
        pager.listen(folder / "pager.sock", open_source(memory_file))
        assert ask(server, "/readyz")[0] == 200
        pager.drain()
        assert ask(server, "/readyz")[0] == 503
        assert ask(server, "/healthz")[0] == 200
        pager.close()
        assert ask(server, "/readyz")[0] == 503
        assert ask(server, "/metrics")[0] == 200


def test_vms_come_as_json_with_a_version(server: StatusServer) -> None:
    status, kind, content = ask(server, "/vms")
    assert (status, kind) == (200, "application/json")
    said = json.loads(content)
    assert said["version"] == 1
    assert said["pager"]["pid"] == os.getpid()
    [vm] = said["vms"]
    assert vm["name"] == "vm-7"
    assert vm["pages"] == {"total": 8, "present": 2, "removed": 0, "failed": 0, "lacking": 6}
    assert vm["size"] == 8 * PAGE


@pytest.mark.parametrize(("query", "cells"), [("", 8), ("?cells=1", 1), ("?cells=3", 3), ("?cells=4096", 8)])
def test_a_vm_is_looked_into_in_as_many_cells_as_wanted(server: StatusServer, query: str, cells: int) -> None:
    vm = json.loads(ask(server, f"/vms/vm-7{query}")[2])["vm"]
    assert len(vm["cells"]) == cells
    assert vm["cell_states"] == ["present", "removed", "failed", "lacking"]
    assert [sum(states) for states in zip(*vm["cells"], strict=True)] == [2, 0, 0, 6]


def test_a_vm_of_any_name_is_found(pager: PagerStandIn, server: StatusServer) -> None:
    pager.served.append(SessionStandIn("a/b ?#ü%"))
    assert json.loads(ask(server, "/vms/a%2Fb%20%3F%23%C3%BC%25")[2])["vm"]["name"] == "a/b ?#ü%"


# Whom it refuses.


@pytest.mark.parametrize("path", ["/nothing", "/metrics/", "/vms/vm-8", "/vms/"])
def test_what_is_not_there_is_404(server: StatusServer, path: str) -> None:
    status, kind, content = ask(server, path)
    assert (status, kind.split(";")[0]) == (404, "text/plain")
    assert b"/metrics" in content


@pytest.mark.parametrize("cells", ["0", "-1", "4097", "x", "1e3", "%00", "9" * 5000, "0000000001" + "9" * 6])
def test_a_question_that_makes_no_sense_is_400(server: StatusServer, cells: str) -> None:
    assert ask(server, f"/vms/vm-7?cells={cells}")[0] == 400


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_it_can_only_be_read(server: StatusServer, method: str) -> None:
    assert ask(server, "/vms", method)[0] == 405


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET /healthz HTTP/9.9\r\n\r\n", 505),
        (b"GET /healthz HTTP/x\r\n\r\n", 400),
        (b"BREW /healthz HTTP/1.1\r\n\r\n", 501),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET http://[::1/ HTTP/1.1\r\n\r\n", 400),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else str(value),
)
def test_a_bad_request_gets_its_status_and_the_next_is_answered(server: StatusServer, request_: bytes, status: int) -> None:
    first = said_to(server, request_).partition(b"\r\n")[0]
    assert f" {status} ".encode() in first or first.startswith(f"{status} ".encode()), first
    assert ask(server, "/healthz")[0] == 200


def test_what_cannot_be_answered_is_500_and_says_so_in_the_log(
    pager: PagerStandIn, server: StatusServer, caplog: pytest.LogCaptureFixture
) -> None:
    pager.served[0].stats = None  # type: ignore[assignment]
    status, _, content = ask(server, "/vms")
    assert (status, b"AttributeError" in content) == (500, True)
    assert "/vms could not be answered" in caplog.text
    ask(server, "/vms")
    assert caplog.text.count("could not be answered") == 1, "once is enough"


# Nobody holds it up.


def test_silent_clients_hold_up_nobody_and_the_oldest_goes_first(server: StatusServer) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(MOST_CONNECTIONS)]
        assert ask(server, "/healthz")[0] == 200
        assert silent[0].recv(1) == b"", "one had to go"
        # The others are still there: the last of them is answered.
        silent[-1].sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert silent[-1].recv(12) == b"HTTP/1.0 200"


def test_a_burst_of_clients_takes_no_more_threads_than_there_are_places(server: StatusServer) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        burst = [stack.enter_context(connect(server)) for _ in range(3 * MOST_CONNECTIONS)]
        for client in burst:
            client.sendall(b"GET /healthz HT")
        # By the time that the first of the last third is hung up on, all have been taken.
        assert burst[2 * MOST_CONNECTIONS - 1].recv(1) == b""
        # One or two may be ending.
        assert threading.active_count() <= before + MOST_CONNECTIONS + 2


@pytest.mark.parametrize("accept", ["application/openmetrics-text;version=zzz", ";;;=,", "\u00e9"])
def test_whoever_accepts_nonsense_gets_the_plain_format(server: StatusServer, accept: str) -> None:
    said = said_to(server, f"GET /metrics HTTP/1.0\r\nAccept: {accept}\r\n\r\n".encode())
    assert b" 200 " in said.partition(b"\r\n")[0]
    assert b"latepage_" in said


@pytest.mark.parametrize("said", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost"])
def test_a_client_that_does_not_finish_is_hung_up_on(pager: PagerStandIn, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(status_server, "PATIENCE", 0.05)
    with StatusServer(pager.as_pager(), LOCAL) as server, connect(server) as client:
        client.sendall(said)
        while client.recv(4096):
            pass


def test_a_client_that_goes_away_does_not_matter(server: StatusServer) -> None:
    for _ in range(20):
        with connect(server) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert ask(server, "/healthz")[0] == 200


def test_it_goes_on_when_descriptors_are_to_be_had_again(server: StatusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = threading.Event()
    take = socketserver.TCPServer.get_request

    def short(self: socketserver.TCPServer) -> Any:
        if not refused.is_set():
            refused.set()
            raise OSError(errno.EMFILE, "Too many open files")
        return take(self)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", short)
    assert ask(server, "/healthz")[0] == 200
    assert refused.is_set()


# Nothing of it is left.


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_its_end_is_the_end_of_every_client_and_leaves_nothing(pager: PagerStandIn, folder: Path, kind: str) -> None:
    descriptors_before, threads_before = descriptors(), threading.active_count()
    path = folder / "status.sock"
    with ExitStack() as stack:
        with StatusServer(pager.as_pager(), LOCAL if kind == "tcp" else str(path)) as server:
            silent = [stack.enter_context(connect(server)) for _ in range(3)]
            assert ask(server, "/healthz")[0] == 200
        for client in silent:
            assert client.recv(1) == b""
        assert threading.active_count() == threads_before
    assert descriptors() == descriptors_before
    assert not path.exists()


def test_what_is_at_the_path_by_then_is_left_alone(pager: PagerStandIn, folder: Path) -> None:
    path = folder / "status.sock"
    with socket.socket(socket.AF_UNIX) as another:
        with StatusServer(pager.as_pager(), str(path)):
            path.rename(folder / "elsewhere")
            another.bind(str(path))
        assert path.exists()


# Where it listens.


@pytest.mark.parametrize("address", ["127.0.0.1:0", ":0", "[::1]:0", "localhost:0"])
def test_it_listens_at_a_port(pager: PagerStandIn, address: str) -> None:
    if "::1" in address and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    with StatusServer(pager.as_pager(), address) as server:
        assert isinstance(server.address, TcpAddress)
        assert server.address.port
        assert ask(server, "/healthz")[0] == 200


def test_a_unix_socket_is_for_user_and_group_and_a_stale_one_is_replaced(pager: PagerStandIn, folder: Path) -> None:
    path = folder / "status.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with StatusServer(pager.as_pager(), str(path)) as server:
        assert server.address == UnixAddress(str(path))
        assert path.stat().st_mode & 0o777 == 0o660
        assert ask(server, "/healthz")[0] == 200


def test_a_port_that_is_taken_says_so(pager: PagerStandIn, server: StatusServer) -> None:
    assert isinstance(server.address, TcpAddress)
    with pytest.raises(ListenError, match="another process is listening there") as error:
        StatusServer(pager.as_pager(), f"127.0.0.1:{server.address.port}").__enter__()
    assert error.value.errno == errno.EADDRINUSE


def test_a_unix_socket_that_lives_says_so_and_lives_on(pager: PagerStandIn, folder: Path) -> None:
    path = str(folder / "status.sock")
    with StatusServer(pager.as_pager(), path) as first:
        with pytest.raises(ListenError, match="another process is listening there"):
            StatusServer(pager.as_pager(), path).__enter__()
        assert ask(first, "/healthz")[0] == 200


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("{}/file", "there is a file of that name"),
        ("{}/folder", "there is a directory of that name"),
        ("{}/link", "there is a link of that name"),
        ("{}/none/status.sock", "there is no folder {}/none; make it first"),
        ("{}/file/status.sock", "there is no folder {}/file"),
        ("./" + "a" * 120, "has 122 bytes"),
        ("203.0.113.7:0", "this machine has no such address"),
        ("no-such-host.invalid:1", "name an address of this machine"),
        ("127.0.0.1:65536", "no port 65536"),
        ("9464", "write HOST:PORT"),
        ("", "write HOST:PORT"),
        ("::1:9464", "write HOST:PORT"),
        ("localhost", "write HOST:PORT"),
        ("127.0.0.1:", "write HOST:PORT"),
        ("{}/", "no path for a socket"),
    ],
)
def test_an_address_that_cannot_be_says_why_and_leaves_nothing(
    pager: PagerStandIn, folder: Path, address: str, says: str
) -> None:
    (folder / "file").touch()
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("file")
    before = descriptors(), threading.active_count(), sorted(folder.iterdir())
    with pytest.raises(ListenError) as error:
        StatusServer(pager.as_pager(), address.replace("{}", str(folder))).__enter__()
    assert says.replace("{}", str(folder)) in str(error.value)
    assert before == (descriptors(), threading.active_count(), sorted(folder.iterdir()))


# Of real VMs.


def wait_for(pager: Pager, kind: type[Event]) -> None:
    assert any(isinstance(event, kind) for event in pager.events(timeout=20))


def growing(content: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Everything that only grows, by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
        if family.type in {"counter", "histogram"}
    }


@pytest.mark.needs("/dev/userfaultfd")
def test_no_counter_goes_back_when_a_vm_ends(folder: Path, memory_file: Path, peer: Callable[[], Peer]) -> None:
    with Pager() as pager, StatusServer(pager, LOCAL) as server:
        pager.listen(folder / "pager.sock", open_source(memory_file), Policy(fault_around=PAGE))
        vm = peer()
        vm.map(256 * PAGE)
        vm.introduce(folder / "pager.sock")
        vm.read_all()
        before = growing(ask(server, "/metrics")[2])
        assert b'latepage_vms{memory="complete"} 1.0' in ask(server, "/metrics")[2]
        vm.child.kill()
        wait_for(pager, Ended)
        content = ask(server, "/metrics")[2]
        after = growing(content)
        assert before.keys() == after.keys()
        assert [name for name, value in before.items() if after[name] < value] == []
        assert after["latepage_faults_total", ()] == 256
        waits = {labels: value for (name, labels), value in after.items() if name == "latepage_fault_duration_seconds_count"}
        assert sum(waits.values()) == 256
        assert waits[("page_class", "zero"), ("result", "installed")] == 16
        assert after["latepage_vms_ended_total", ()] == 1
        assert b'latepage_vms{memory="complete"} 0.0' in content


@pytest.mark.needs("/dev/userfaultfd")
@pytest.mark.parametrize("per_vm", [False, True])
def test_a_real_vm_is_named_where_that_was_asked_for(
    folder: Path, memory_file: Path, peer: Callable[[], Peer], per_vm: bool
) -> None:
    with Pager() as pager, StatusServer(pager, LOCAL, per_vm=per_vm) as server:
        pager.listen(folder / "pager.sock", open_source(memory_file), Policy(populate="background"))
        vm = peer()
        vm.map(256 * PAGE)
        vm.introduce(folder / "pager.sock", form="latepage", name="vm-7")
        wait_for(pager, SessionStarted)
        assert pager.session("vm-7").wait_populated(20)
        assert (b"vm-7" in ask(server, "/metrics")[2]) == per_vm
        said = json.loads(ask(server, "/vms/vm-7?cells=4")[2])["vm"]
        assert said["cells"] == [[64, 0, 0, 0]] * 4
        assert said["counters"]["populated_pages"] == 256
        [region] = said["regions"]
        assert (region["hva"], region["size"]) == (vm.hva, vm.size)


# latepage serve --metrics


def test_serve_says_where_it_tells_and_takes_it_away_at_the_end(serve: Callable[..., Serve], folder: Path) -> None:
    path = folder / "status.sock"
    process = serve("--metrics", str(path))
    assert f"latepage serve: metrics at unix:{path}" in process.said()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.0 200"
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(path))
            process.child.send_signal(signal.SIGTERM)
            process.event("drained")
            assert process.finish() == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (("--metrics", "{}/guest.mem"), 1, "there is a file of that name"),
        (("--metrics", "{}/none/x"), 1, "make it first"),
        (("--metrics", "127.0.0.1:99999"), 2, "no port 99999"),
        (("--metrics", "9464"), 2, "write HOST:PORT"),
        (("--metrics-per-vm",), 2, "give --metrics ADDRESS too"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_serve_does_not_begin_where_it_cannot_tell(
    serve: Callable[..., Serve], folder: Path, flags: tuple[str, ...], status: int, says: str
) -> None:
    process = serve(*(flag.replace("{}", str(folder)) for flag in flags), listens=False)
    assert process.finish() == status
    assert says in process.said()
    assert not (folder / "pager.sock").exists()
