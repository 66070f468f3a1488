"""`latepage top`: what it shows of a pager's VMs, what its keys do, and what it says when the pager goes."""

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from textual.pilot import Pilot
from textual.widgets import Static

from actors.memory_file import PAGE
from actors.pager_stand_in import PagerStandIn, SessionStandIn, some_stats
from actors.peer import Peer
from actors.serve import Serve
from latepage import LatepageError, Pager, Policy, open_source
from latepage.observe.address import parse_address
from latepage.observe.status_server import StatusServer
from latepage.observe.top import reader as reader_module
from latepage.observe.top.app import TopApp, VmTable
from latepage.observe.top.detail import VmScreen
from latepage.observe.top.figures import Look, VmLook, rates, total_rates
from latepage.observe.top.reader import HttpReader, VmGoneError
from latepage.observe.top.show import Column, memory, once, ordered
from latepage.observe.vms import all_vms, one_vm

NEVER = 3600.0
"""Seconds between two looks, so that there are only those that a test asks for."""


@dataclass
class StandInReader:
    """Answers from a pager that a test makes up; each answer is a second later than the one before."""

    pager: PagerStandIn
    gone: bool = False
    pid: int = 1
    clock: float = field(default=100.0)

    async def all_vms(self) -> Look:
        self._tick()
        said = all_vms(self.pager.as_pager())
        said["pager"]["pid"] = self.pid
        return Look.from_json(said | {"clock": self.clock})

    async def one_vm(self, name: str, cells: int) -> VmLook:
        self._tick()
        try:
            said = one_vm(self.pager.as_pager().session(name), cells)
        except KeyError:
            raise VmGoneError(f"{name}: not served any more") from None
        return VmLook.from_json(said | {"clock": self.clock})

    def _tick(self) -> None:
        self.clock += 1
        if self.gone:
            raise LatepageError("status.sock: Connection refused")


@pytest.fixture
def pager() -> PagerStandIn:
    """Three VMs, of which each is first in some order."""
    return PagerStandIn(
        [
            SessionStandIn("vm-10", total=100, present=50, age=30, stats=some_stats(faults=50)),
            SessionStandIn("vm-9", total=100, present=100, age=10, stats=some_stats(faults=5, populated_pages=95)),
            SessionStandIn("db", total=400, present=100, age=20, stats=some_stats(faults=100, stalls=2)),
        ]
    )


def run(reader: StandInReader | HttpReader, test: Callable[[Pilot[None]], Awaitable[None]], **options: Any) -> None:
    """Runs a test with the screen, after its first look."""

    async def body() -> None:
        app = TopApp(reader, "status.sock", interval=NEVER, **options)
        async with app.run_test(size=(120, 40)) as pilot:
            await look(pilot)
            await test(pilot)

    asyncio.run(body())


async def look(pilot: Pilot[None]) -> None:
    """Has it look once more, and waits until that is drawn."""
    app = pilot.app
    assert isinstance(app, TopApp)
    await app.look()
    await pilot.pause()


def table(pilot: Pilot[None]) -> list[list[str]]:
    """What stands in the rows."""
    shown = pilot.app.screen_stack[0].query_one(VmTable)
    return [[cell.plain for cell in shown.get_row_at(number)] for number in range(shown.row_count)]


def names(pilot: Pilot[None]) -> list[str]:
    return [row[0] for row in table(pilot)]


def text(pilot: Pilot[None], widget: str) -> str:
    """What a widget of the screen in front says."""
    return plain(pilot.app.screen.query_one(widget, Static).content)


def plain(content: Any) -> str:
    console = Console(width=140, color_system=None)
    with console.capture() as captured:
        console.print(content)
    return captured.get()


def test_a_row_says_how_a_vm_is(pager: PagerStandIn) -> None:
    async def test(pilot: Pilot[None]) -> None:
        db, nine, ten = table(pilot)
        assert [db[0], nine[0], ten[0]] == ["db", "vm-9", "vm-10"]
        assert db[1].endswith(" 25%")
        assert nine[1].endswith(" 100%")
        assert db[3:7] == ["10 µs", "10 µs", "2", "0"]
        assert db[8:10] == ["1.2 MiB", "1.6 MiB"]
        assert nine[8] == "-"
        assert db[10] == "20s"

    run(StandInReader(pager), test)


def test_rates_are_what_has_grown_between_two_looks(pager: PagerStandIn) -> None:
    reader = StandInReader(pager)

    async def test(pilot: Pilot[None]) -> None:
        db = pager.served[2]
        db.stats, db.age = some_stats(faults=340, populated_pages=5), 21
        pager.stats = some_stats(faults=1000, bytes_installed=3 << 20)
        await look(pilot)
        assert table(pilot)[0][2] == "240"
        assert table(pilot)[0][7] == "5.0"
        assert "faults 1,000/s" in text(pilot, "#totals")
        assert "installed 3 MiB/s" in text(pilot, "#totals")

    run(reader, test)


def test_a_new_vm_of_an_old_name_has_no_rate_yet(pager: PagerStandIn) -> None:
    before = Look.from_json(all_vms(pager.as_pager()))
    pager.served[0].age = 1
    now = Look.from_json(all_vms(pager.as_pager()))
    assert rates(before, now, now.vms[0]) is None
    assert rates(before, now, now.vms[1]) is not None
    assert total_rates(before, now) is not None
    pager.stats = some_stats(faults=5)
    another = Look.from_json(all_vms(pager.as_pager()))
    assert total_rates(another, now) is None, "what went back is another pager's"


@pytest.mark.parametrize(
    ("key", "first"),
    [("n", "db"), ("m", "db"), ("f", "db"), ("s", "db"), ("o", "vm-9"), ("a", "vm-9")],
)
def test_keys_sort_and_turn_round(pager: PagerStandIn, key: str, first: str) -> None:
    reader = StandInReader(pager)

    async def test(pilot: Pilot[None]) -> None:
        pager.served[1].stats = some_stats(faults=6, populated_pages=100)
        pager.served[2].stats = some_stats(faults=200, stalls=2)
        await look(pilot)
        await pilot.press("r", key)
        assert names(pilot)[0] == first
        await pilot.press("r")
        assert names(pilot)[-1] == first
        headings = [str(column.label) for column in pilot.app.query_one(VmTable).columns.values()]
        assert sum("▲" in heading for heading in headings) == 1

    run(reader, test)


@pytest.mark.parametrize("column", list(Column))
def test_every_column_orders_and_equals_stand_by_name(pager: PagerStandIn, column: Column) -> None:
    now = Look.from_json(all_vms(pager.as_pager()))
    vms = [(vm, None) for vm in now.vms]
    forward = [vm.name for vm, _ in ordered(vms, column, reverse=False)]
    assert sorted(forward) == ["db", "vm-10", "vm-9"]
    assert [vm.name for vm, _ in ordered(vms, column, reverse=True)] == forward[::-1]
    if column in {Column.NAME, Column.FAILED, Column.FAULTS, Column.POPULATION}:
        assert forward == ["db", "vm-9", "vm-10"]


def test_the_cursor_stays_with_its_vm(pager: PagerStandIn) -> None:
    async def test(pilot: Pilot[None]) -> None:
        await pilot.press("down")
        rows = pilot.app.query_one(VmTable)
        assert names(pilot)[rows.cursor_row] == "vm-9"
        await pilot.press("a")
        assert names(pilot)[rows.cursor_row] == "vm-9"
        pager.served.insert(0, SessionStandIn("a-first", age=1))
        del pager.served[-1]
        await look(pilot)
        assert names(pilot) == ["a-first", "vm-9", "vm-10"]
        assert names(pilot)[rows.cursor_row] == "vm-9"

    run(StandInReader(pager), test)


def test_a_name_is_shown_as_it_is(pager: PagerStandIn) -> None:
    async def test(pilot: Pilot[None]) -> None:
        assert names(pilot) == ["[red]vm[/]"]
        await pilot.press("enter")
        assert "[red]vm[/]" in text(pilot, "#vm")

    pager.served = [SessionStandIn("[red]vm[/]")]
    run(StandInReader(pager), test)


def test_nothing_that_is_shown_leads_the_terminal(pager: PagerStandIn) -> None:
    async def test(pilot: Pilot[None]) -> None:
        assert names(pilot) == ["a?[2J", "b?c"]
        await pilot.press("enter")
        assert text(pilot, "#vm").startswith("a?[2J ")

    pager.served = [SessionStandIn("a\x1b[2J"), SessionStandIn("b\nc")]
    run(StandInReader(pager), test)


def test_a_vm_is_looked_into_and_left_again(pager: PagerStandIn) -> None:
    async def test(pilot: Pilot[None]) -> None:
        await pilot.press("enter")
        assert isinstance(pilot.app.screen, VmScreen)
        said = text(pilot, "#vm")
        assert said.startswith("db   pid 4242   1.6 MiB of shared memory")
        assert "0x7f0000000000" in said
        assert "▀" in said
        assert "source" in said
        assert "stalls" in said
        pager.served[2].present = 400
        await look(pilot)
        assert "100%" in text(pilot, "#vm")
        await pilot.press("escape")
        assert not isinstance(pilot.app.screen, VmScreen)
        assert table(pilot)[0][1].endswith("100%")

    run(StandInReader(pager), test)


def test_a_vm_that_ends_while_it_is_looked_into_stays_as_it_was(pager: PagerStandIn) -> None:
    async def test(pilot: Pilot[None]) -> None:
        await pilot.press("enter")
        del pager.served[2]
        await look(pilot)
        assert "db has ended" in text(pilot, "#trouble")
        assert text(pilot, "#vm").startswith("db ")
        await pilot.press("escape")
        assert names(pilot) == ["vm-9", "vm-10"]

    run(StandInReader(pager), test)


def test_a_pager_that_goes_is_seen_and_what_was_last_seen_stays(pager: PagerStandIn) -> None:
    reader = StandInReader(pager)

    async def test(pilot: Pilot[None]) -> None:
        trouble = pilot.app.query_one("#trouble", Static)
        assert not trouble.display
        reader.gone = True
        await look(pilot)
        assert trouble.display
        assert "Connection refused" in text(pilot, "#trouble")
        assert "asked again" in text(pilot, "#trouble")
        assert pilot.app.query_one(VmTable).has_class("stale")
        assert len(table(pilot)) == 3
        reader.gone, reader.pid = False, 2
        await look(pilot)
        assert not trouble.display
        assert not pilot.app.query_one(VmTable).has_class("stale")
        assert [row[2] for row in table(pilot)] == [""] * 3, "no rate from one pager to another"
        assert [toast.message for toast in pilot.app._notifications] == ["another pager answers now"]

    run(reader, test)


def test_a_pager_that_goes_while_a_vm_is_looked_into_is_seen_there_too(pager: PagerStandIn) -> None:
    reader = StandInReader(pager)

    async def test(pilot: Pilot[None]) -> None:
        await pilot.press("enter")
        reader.gone = True
        await look(pilot)
        assert "Connection refused" in text(pilot, "#trouble")
        reader.gone = False
        await look(pilot)
        assert not pilot.app.screen.query_one("#trouble").display

    run(reader, test)


def test_it_looks_again_by_itself(pager: PagerStandIn) -> None:
    asked = asyncio.Event()

    class Counting(StandInReader):
        async def all_vms(self) -> Look:
            if self.clock > 103:
                asked.set()
            return await super().all_vms()

    async def body() -> None:
        async with TopApp(Counting(pager), "status.sock", interval=0.01).run_test():
            await asyncio.wait_for(asked.wait(), 20)

    asyncio.run(body())


@pytest.mark.parametrize("looked_into", [False, True])
def test_an_answer_that_comes_while_it_ends_does_no_harm(pager: PagerStandIn, looked_into: bool) -> None:
    class Late(StandInReader):
        async def all_vms(self) -> Look:
            await answer.wait()
            return await super().all_vms()

        async def one_vm(self, name: str, cells: int) -> VmLook:
            await answer.wait()
            return await super().one_vm(name, cells)

    async def body() -> None:
        answer.set()
        app = TopApp(Late(pager), "status.sock", interval=NEVER)
        async with app.run_test(size=(120, 40)) as pilot:
            await look(pilot)
            if looked_into:
                await pilot.press("enter")
            screen = app.screen
            answer.clear()
            late = asyncio.create_task(screen.look() if isinstance(screen, VmScreen) else app.look())
            await pilot.pause()
        assert not late.done()
        answer.set()
        await late

    answer = asyncio.Event()
    asyncio.run(body())


def test_a_failed_page_is_seen_among_many() -> None:
    drawn = memory([(1000, 0, 0, 0), (999, 0, 1, 0), (0, 0, 0, 1000)], width=3)
    assert drawn.plain == "▀▀▀"
    colours = [span.style.color.triplet.hex for span in drawn.spans]  # type: ignore[union-attr]
    assert colours == ["#3fb950", "#f85149", "#30363d"]


def test_no_vm_yet_is_said() -> None:
    assert "no VM is served now" in plain(
        once(None, Look.from_json(all_vms(PagerStandIn().as_pager())), Column.NAME, reverse=False)
    )


# Over the wire.


@pytest.mark.parametrize("place", ["127.0.0.1:0", "{}/status.sock"])
def test_it_reads_a_pager_over_either_kind_of_socket(pager: PagerStandIn, folder: Path, place: str) -> None:
    pager.served.append(SessionStandIn("a/b ?#ü%"))

    async def body(address: str) -> tuple[Look, VmLook]:
        async with HttpReader(parse_address(address)) as reader:
            with pytest.raises(VmGoneError):
                await reader.one_vm("nobody", 4)
            return await reader.all_vms(), await reader.one_vm("a/b ?#ü%", 4)

    with StatusServer(pager.as_pager(), place.replace("{}", str(folder))) as server:
        everyone, one = asyncio.run(body(str(server.address)))
    assert [vm.name for vm in everyone.vms] == ["vm-10", "vm-9", "db", "a/b ?#ü%"]
    assert one.cells == ((2, 0, 0, 0), (0, 0, 0, 2), (0, 0, 0, 2), (0, 0, 0, 2))


@pytest.mark.needs("/dev/userfaultfd")
def test_a_real_vm_is_shown_as_it_is(folder: Path, memory_file: Path, peer: Callable[[], Peer]) -> None:
    with Pager() as pager, StatusServer(pager, str(folder / "status.sock")):
        pager.listen(folder / "pager.sock", open_source(memory_file), Policy(fault_around=PAGE))
        vm = peer()
        vm.map(256 * PAGE)
        name = vm.introduce(folder / "pager.sock")
        for page in range(64):
            vm.read(page)

        async def test(pilot: Pilot[None]) -> None:
            [row] = table(pilot)
            assert row[0] == name
            assert row[1].endswith((" 24%", " 25%")), "the last page is perhaps not marked yet"
            await pilot.press("enter")
            assert f"{vm.hva:#x}" in text(pilot, "#vm")

        async def body() -> None:
            async with HttpReader(parse_address(str(folder / "status.sock"))) as reader:
                app = TopApp(reader, "status.sock", interval=NEVER)
                async with app.run_test(size=(120, 40)) as pilot:
                    await look(pilot)
                    await test(pilot)

        asyncio.run(body())


# The command.


@pytest.fixture
def address(pager: PagerStandIn, folder: Path) -> Iterator[str]:
    path = str(folder / "status.sock")
    with StatusServer(pager.as_pager(), path):
        yield path


def top(*arguments: str, python: tuple[str, ...] = ("-m", "latepage")) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *python, "top", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_once_prints_a_table_and_ends(address: str) -> None:
    said = top(address, "--once", "--interval", "0.05", "--sort", "stalls")
    assert (said.returncode, said.stderr) == (0, "")
    lines = said.stdout.splitlines()
    assert "ready" in lines[0]
    rows = [line.split()[0] for line in lines if line.startswith(("db", "vm-"))]
    assert rows == ["db", "vm-9", "vm-10"]
    assert all(heading in said.stdout for heading in ("faults/s", "p99", "stalls", "lacking", "age"))


def test_json_prints_what_the_pager_says(address: str) -> None:
    said = top(address, "--json")
    assert said.returncode == 0
    document = json.loads(said.stdout)
    assert document["version"] == 1
    assert [vm["name"] for vm in document["vms"]] == ["vm-10", "vm-9", "db"]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("{}/none.sock", "--once"), 1, "does `latepage serve --metrics` run there?"),
        (("127.0.0.1:1", "--json"), 1, "does `latepage serve --metrics` run there?"),
        (("9464", "--once"), 2, "write HOST:PORT"),
        (("{}/status.sock",), 2, "this is no terminal"),
        (("{}/status.sock", "--once", "--interval", "0"), 2, "--interval is 0"),
        (("{}/status.sock", "--sort", "colour"), 2, "colour"),
        ((), 2, "ADDRESS"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_work_says_why(folder: Path, address: str, arguments: tuple[str, ...], status: int, says: str) -> None:
    said = top(*(argument.replace("{}", str(folder)) for argument in arguments))
    assert (said.returncode, says in said.stderr + said.stdout) == (status, True), said
    assert "Traceback" not in said.stderr


def test_without_textual_it_says_what_to_install(address: str) -> None:
    program = (
        "import sys; sys.modules['textual'] = None\n"
        "sys.stdin.isatty = sys.stdout.isatty = lambda: True\n"
        "from latepage.cli import main; main()"
    )
    said = top(address, python=("-c", program))
    assert said.returncode == 1
    assert "pip install 'latepage[top]'" in said.stderr
    assert top(address, "--json", python=("-c", program)).returncode == 0


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\nhello", "no pager's status server"),
        (b"HTTP/1.0 404 Not Found\r\n\r\n{}", "no pager's status server"),
        (b"HTTP/1.0 200 OK\r\n\r\n[]", "no pager's status server"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"version": 2}', "speaks version 2"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"version": 1}', "not what it should be: KeyError"),
        (b"nonsense\r\n\r\n", "does `latepage serve --metrics` run there?"),
        (b"", "does `latepage serve --metrics` run there?"),
    ],
)
def test_what_is_no_pager_is_named(folder: Path, answer: bytes, says: str) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def body() -> None:
        path = str(folder / "other.sock")
        async with await asyncio.start_unix_server(respond, path), HttpReader(parse_address(path)) as reader:
            with pytest.raises(LatepageError) as error:
                await reader.all_vms()
        assert says in str(error.value)

    asyncio.run(body())


@pytest.mark.parametrize(("bound", "value"), [("PATIENCE", 0.2), ("MOST_BYTES", 1 << 16)])
def test_an_answer_without_end_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: float) -> None:
    """Neither for ever, though each read of it is quick, nor until it fills memory."""
    monkeypatch.setattr(reader_module, bound, value)
    hung_up = asyncio.Event()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" " if bound == "PATIENCE" else bytes(4096))
            await asyncio.sleep(0)
        hung_up.set()

    async def body() -> str:
        path = str(folder / "other.sock")
        async with asyncio.timeout(20), await asyncio.start_unix_server(respond, path):
            async with HttpReader(parse_address(path)) as reader:
                with pytest.raises(LatepageError) as error:
                    await reader.all_vms()
            await hung_up.wait()
        return str(error.value)

    said = asyncio.run(body())
    assert ("no answer within 0.2 s" if bound == "PATIENCE" else "goes on after") in said


@pytest.mark.needs("/dev/userfaultfd")
def test_on_a_terminal_it_follows_a_pager_to_its_end(serve: Callable[..., Serve], folder: Path, peer: Callable[[], Peer]) -> None:
    pager = serve("--metrics", str(folder / "status.sock"))
    vm = peer()
    vm.map(256 * PAGE)
    vm.introduce(folder / "pager.sock")
    vm.read_all()
    try:
        terminal, slave = pty.openpty()
    except OSError as error:
        pytest.skip(f"no terminal is to be had: {error}")
    shown = b""

    def until(wanted: str) -> None:
        nonlocal shown
        deadline = time.monotonic() + 20
        while wanted.encode() not in shown and time.monotonic() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 65_536)
        assert wanted.encode() in shown, shown[-2000:].decode(errors="replace")

    command = [sys.executable, "-m", "latepage", "top", str(folder / "status.sock"), "--interval", "0.05"]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as screen:
        try:
            until(f"vm-{vm.pid}")
            until("100%")
            vm.child.kill()
            pager.child.send_signal(signal.SIGTERM)
            assert pager.finish() == 0
            until("No answer")
            os.write(terminal, b"q")
            # What it still draws must be read, or it could not end.
            while screen.poll() is None:
                if select.select([terminal], [], [], 0.05)[0]:
                    os.read(terminal, 65_536)
            assert screen.returncode == 0
        finally:
            screen.kill()
            os.close(slave)
            os.close(terminal)
