"""Memory from a function: right contents, and what becomes of a function that raises, lies, hangs, or calls back."""

import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from actors.memory_file import PAGE, first_byte, page_contents
from actors.peer import Peer
from latepage import CallbackSource, LatepageError, Pager, PagerError, Policy, SourceError
from latepage.events import Ended, Event, Failed, Populated, PopulationStopped, Refused, SessionStarted
from latepage.kvm import Job, Vm

pytestmark = pytest.mark.needs("/dev/userfaultfd")

PAGES = 256
SIZE = PAGES * PAGE
ONE = Policy(fault_around=PAGE)
E = TypeVar("E")
K = TypeVar("K", bound=Event)


def contents(page: int) -> bytes | None:
    """What page `page` holds: each 16th is zero."""
    return None if page % 16 == 15 else page_contents(page)


def supply(offset: int, length: int) -> bytes | None:
    """The memory of these tests."""
    pages = [contents(page) for page in range(offset // PAGE, (offset + length) // PAGE)]
    return None if not any(pages) else b"".join(page or bytes(PAGE) for page in pages)


class Gate:
    """A callback that stays inside on some pages until it is let go."""

    def __init__(self, *pages: int) -> None:
        self._pages = set(pages)
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, offset: int, length: int) -> bytes | None:
        if self._pages & set(range(offset // PAGE, (offset + length) // PAGE)):
            self.entered.release()
            assert self.open.wait(60)
        return supply(offset, length)


@pytest.fixture
def gates() -> Iterator[Callable[..., Gate]]:
    """Makes gates, and lets all who are inside go at the end."""
    made: list[Gate] = []

    def make(*pages: int) -> Gate:
        made.append(Gate(*pages))
        return made[-1]

    yield make
    for gate in made:
        gate.open.set()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """After each test there are the threads that were there before."""
    before = threads()
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("latepage "):
            thread.join(20)
    assert settled(threads, before) == before


def settled(look: Callable[[], E], wanted: E) -> E:
    """What `look` sees, once that is what is wanted, or it never was: the kernel forgets a thread just after it was joined."""
    deadline = time.monotonic() + 10
    while (seen := look()) != wanted and time.monotonic() < deadline:
        os.sched_yield()
    return seen


def threads() -> list[str]:
    """The names of this process's threads, the engine's among them."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # ended since it was listed
            found.append((task / "comm").read_text().strip())
    return sorted(found)


def descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            found.append(str(link.readlink()))
    return sorted(found)


@pytest.fixture
def pager() -> Iterator[Pager]:
    """A pager."""
    with Pager() as pager:
        yield pager


def wait_for(pager: Pager, kind: type[K], **fields: Any) -> K:
    """The next event of that kind with these fields."""
    for event in pager.events(timeout=20):
        if isinstance(event, kind) and all(getattr(event, name) == value for name, value in fields.items()):
            return event
    raise AssertionError(f"no {kind.__name__} came")


def started(pager: Pager, vm: Peer, socket: Path, backing: str = "anonymous", size: int = SIZE) -> str:
    """Has a VM served, and its name."""
    vm.map(size, backing)
    name = vm.introduce(socket, form="latepage")
    wait_for(pager, SessionStarted, vm=name)
    return name


@pytest.mark.parametrize("backing", ["anonymous", "shared"])
@pytest.mark.parametrize("populate", ["none", "background"])
def test_every_page_is_what_the_callback_says(
    pager: Pager, folder: Path, peer: Callable[[], Peer], populate: Any, backing: str
) -> None:
    asked: list[tuple[int, int]] = []
    kinds = [bytes, bytearray, memoryview]

    def fn(offset: int, length: int) -> bytes | bytearray | memoryview | None:
        asked.append((offset, length))
        found = supply(offset, length)
        return None if found is None else kinds[len(asked) % 3](found)

    source = CallbackSource(fn, size=SIZE, batch=32 * PAGE)
    pager.listen(folder / "s", source, Policy(populate=populate))
    vm = peer()
    name = started(pager, vm, folder / "s", backing)
    assert vm.read_all() == [first_byte(page) for page in range(PAGES)]
    wait_for(pager, Populated, vm=name)
    assert all(offset % PAGE == length % PAGE == 0 for offset, length in asked)
    assert all(PAGE <= length <= 32 * PAGE and offset + length <= SIZE for offset, length in asked)


def test_a_vm_of_this_very_process_gets_its_memory_from_a_callback_of_it(pager: Pager, folder: Path) -> None:
    with Vm.create(memory=4 << 20, guest="threads") as vm:
        vm.run(Job("fill", seed=3))
        assert vm.wait().is_right
        vm.save(folder / "vm.state", folder / "vm.mem")
    memory = (folder / "vm.mem").read_bytes()
    source = CallbackSource(lambda offset, length: memory[offset : offset + length], size=len(memory))
    pager.listen(folder / "s", source)
    with Vm.restore(folder / "vm.state", pager=folder / "s", guest="threads") as vm:
        vm.run(Job("verify", order="random", seed=1))
        assert vm.wait().is_right
        assert vm.compare().is_right


def test_vms_of_one_source_get_the_same_memory_and_its_threads_are_its_own(
    pager: Pager, folder: Path, peer: Callable[[], Peer]
) -> None:
    callers: set[str] = set()

    def fn(offset: int, length: int) -> bytes | None:
        callers.add(threading.current_thread().name)
        return supply(offset, length)

    source = CallbackSource(fn, size=SIZE, name="mine")
    pager.listen(folder / "s", source, Policy(populate="background"))
    pager.listen(folder / "again", source)
    vms = [peer() for _ in range(4)]
    for number, vm in enumerate(vms):
        started(pager, vm, folder / ("again" if number == 3 else "s"))
    for vm in vms:
        assert vm.read_all() == [first_byte(page) for page in range(PAGES)]
    assert callers == {"latepage callback mine"}
    mine = [thread for thread in threading.enumerate() if thread.name == "latepage callback mine"]
    assert len(mine) == 8, "four, and four to stand in"
    assert all(thread.daemon for thread in mine)


def test_an_exception_fails_the_page_closed_and_its_traceback_is_told_once(
    pager: Pager, folder: Path, peer: Callable[[], Peer], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(offset: int, length: int) -> bytes | None:
        if offset // PAGE <= 7 < (offset + length) // PAGE:
            raise KeyError("page 7\nis not there")
        return supply(offset, length)

    pager.listen(folder / "s", CallbackSource(broken, size=SIZE))
    for _ in range(2):
        victim = peer()
        name = started(pager, victim, folder / "s")
        assert victim.read(6) == first_byte(6), "page 7 is in its window, and nobody's fault"
        victim.touch(7)
        failed = wait_for(pager, Failed, vm=name)
        assert failed.address == victim.hva + 7 * PAGE
        assert failed.action == "killed"
        assert "KeyError: 'page 7\\nis not there'" in failed.reason
        assert "broken" in failed.reason
        assert "4096 bytes at offset 0x7000" in failed.reason
        assert victim.finish() == -9
        wait_for(pager, Ended, vm=name)
    told = [record for record in caplog.records if record.name == "latepage"]
    assert len(told) == 1
    assert told[0].levelno == logging.ERROR
    assert told[0].exc_info is not None
    assert told[0].exc_info[0] is KeyError
    assert "in broken" in caplog.text


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (bytes(PAGE - 1), "it returned 4095 bytes where 4096 were asked for"),
        (bytes(PAGE + 1), "it returned 4097 bytes where 4096 were asked for"),
        (b"", "it returned 0 bytes where 4096 were asked for"),
        ("x" * PAGE, "it returned str, and contents are bytes-like, or None for zeros"),
        (PAGE, "it returned int"),
    ],
)
def test_an_answer_that_is_none_fails_closed_and_says_what_came(
    pager: Pager, folder: Path, peer: Callable[[], Peer], answer: Any, says: str
) -> None:
    pager.listen(folder / "s", CallbackSource(lambda _offset, _length: answer, size=SIZE), ONE)
    vm = peer()
    name = started(pager, vm, folder / "s")
    vm.touch(3)
    assert says in wait_for(pager, Failed, vm=name).reason
    assert vm.finish() == -9


class UnspeakableError(Exception):
    """An error that nobody can print."""

    def __str__(self) -> str:
        raise SystemExit(3)


@pytest.mark.parametrize(("error", "says"), [(SystemExit(3), "SystemExit: 3"), (UnspeakableError(), "its text cannot be had")])
def test_a_callback_that_ends_its_thread_ends_nothing(
    pager: Pager, folder: Path, peer: Callable[[], Peer], error: BaseException, says: str
) -> None:
    def leaves(offset: int, length: int) -> bytes | None:
        if offset == 0:
            raise error
        return supply(offset, length)

    pager.listen(folder / "s", CallbackSource(leaves, size=SIZE, threads=1), ONE)
    for _ in range(3):
        vm = peer()
        name = started(pager, vm, folder / "s")
        assert vm.read(9) == first_byte(9)
        vm.touch(0)
        assert says in wait_for(pager, Failed, vm=name).reason


def test_a_callback_past_its_time_limit_fails_its_page_and_is_stood_in_for(
    pager: Pager, folder: Path, peer: Callable[[], Peer], gates: Callable[..., Gate]
) -> None:
    gate = gates(7)
    pager.listen(folder / "s", CallbackSource(gate, size=SIZE, threads=1, time_limit=0.2), ONE)
    vm, next_vm = peer(), peer()
    name = started(pager, vm, folder / "s")
    started(pager, next_vm, folder / "s")
    vm.touch(7)
    failed = wait_for(pager, Failed, vm=name)
    assert "it has not answered within its time limit of 0.2 s; asked for 4096 bytes at offset 0x7000" in failed.reason
    assert vm.finish() == -9
    assert [next_vm.read(page) for page in (8, 9, 10)] == [first_byte(page) for page in (8, 9, 10)]
    # And when the one that stands in hangs too, nobody waits for anybody.
    next_vm.touch(7)
    assert "time limit" in wait_for(pager, Failed).reason
    late = peer()
    name = started(pager, late, folder / "s")
    late.touch(20)
    assert "all of its 2 threads hang" in wait_for(pager, Failed, vm=name).reason
    gate.open.set()
    # One that has come back is as good as new: sooner or later a VM is served again.
    assert any(is_served(peer(), folder / "s") for _ in range(50))


def is_served(vm: Peer, socket: Path) -> bool:
    """Whether a new VM gets a page, and is not killed instead."""
    vm.map(SIZE)
    vm.introduce(socket, form="latepage")
    try:
        return vm.read(20) == first_byte(20)
    except (AssertionError, BrokenPipeError):
        assert vm.finish() == -9
        return False


def test_a_late_return_is_told_once(
    folder: Path, peer: Callable[[], Peer], gates: Callable[..., Gate], caplog: pytest.LogCaptureFixture
) -> None:
    gate = gates(7)
    with Pager() as pager:
        pager.listen(folder / "s", CallbackSource(gate, size=SIZE, time_limit=0.2), ONE)
        vm = peer()
        name = started(pager, vm, folder / "s")
        vm.touch(7)
        wait_for(pager, Failed, vm=name)
        gate.open.set()
    assert [record.levelno for record in caplog.records if record.name == "latepage"] == [logging.WARNING]
    assert "its page had failed after 0.2 s" in caplog.text


def test_a_callback_that_hangs_holds_up_no_vm_of_another_source(
    pager: Pager, folder: Path, peer: Callable[[], Peer], gates: Callable[..., Gate], memory_file: Path
) -> None:
    gate = gates(*range(PAGES))
    hanging = CallbackSource(gate, size=SIZE, time_limit=None, name="hanging")
    pager.listen(folder / "hanging", hanging, Policy(populate="background", fault_around=PAGE))
    pager.listen(folder / "fine", CallbackSource(supply, size=SIZE), Policy(populate="background", fault_around=PAGE))
    stuck = [peer() for _ in range(4)]
    for vm in stuck:
        started(pager, vm, folder / "hanging")
        for page in range(0, 64, 4):
            vm.touch(page)
    for _ in range(4):
        assert gate.entered.acquire(timeout=20)
    for _ in range(3):
        fine = peer()
        name = started(pager, fine, folder / "fine")
        wait_for(pager, Populated, vm=name)
        assert fine.read_all() == [first_byte(page) for page in range(PAGES)]


def test_closing_with_a_callback_that_hangs_does_not_hang(
    folder: Path, peer: Callable[[], Peer], gates: Callable[..., Gate]
) -> None:
    gate = gates(7)
    source = CallbackSource(gate, size=SIZE, time_limit=None, name="hanging")
    with Pager() as pager:
        pager.listen(folder / "s", source, ONE)
        vm = peer()
        name = started(pager, vm, folder / "s")
        vm.touch(7)
        assert gate.entered.acquire(timeout=20)
        pager.drain()
        assert pager.close() == [name]
    assert vm.finish() == -9
    none: list[str] = []
    engine = settled(lambda: [thread for thread in threads() if thread.startswith("latepage-")], none)
    assert engine == [], "no thread of the pager waits for it"
    inside = [thread for thread in threading.enumerate() if thread.name == "latepage callback hanging"]
    assert len(inside) == 1, "only the one that hangs is left, and ends when it returns"
    gate.open.set()
    inside[0].join(20)
    assert not inside[0].is_alive()


def test_a_drain_brings_all_that_is_lacking_through_the_callback(folder: Path, peer: Callable[[], Peer]) -> None:
    with Pager() as pager:
        pager.listen(folder / "s", CallbackSource(supply, size=SIZE), ONE)
        vm = peer()
        started(pager, vm, folder / "s")
        pager.drain()
        for event in pager.events(timeout=20):
            if event.event == "drained":
                break
    assert vm.read_all() == [first_byte(page) for page in range(PAGES)]


def test_a_callback_may_ask_its_pager_and_is_told_what_would_wait_for_ever(
    pager: Pager, folder: Path, peer: Callable[[], Peer]
) -> None:
    refused: list[str] = []
    told: list[Any] = []

    def calls_back(offset: int, length: int) -> bytes | None:
        (session,) = pager.sessions()
        told.append((session.name, session.progress.total, session.stats.faults > 0, session.closed))
        session.populate([(0, PAGE)])
        list(pager.events(timeout=0))
        assert not session.wait_populated(timeout=0)
        blocking: list[Callable[[], object]] = [
            session.wait_populated,
            lambda: session.wait_populated(5),
            pager.close,
            lambda: next(pager.events()),
            lambda: pager.listen(folder / "other", source),
        ]
        for call in blocking:
            with pytest.raises(PagerError, match="have another thread call it") as error:
                call()
            refused.append(str(error.value).split(" was called by ")[0])
        return supply(offset, length)

    source = CallbackSource(calls_back, size=SIZE, threads=1)
    pager.listen(folder / "s", source, ONE)
    vm = peer()
    vm.map(SIZE)
    vm.introduce(folder / "s", form="latepage", name="vm-7")
    assert vm.read(5) == first_byte(5)
    assert told[0] == ("vm-7", PAGES, True, False)
    waits = ["Session.wait_populated"] * 2
    assert refused[:5] == [*waits, "Pager.close", "Pager.events with a timeout", "Pager.listen"]
    assert not (folder / "other").exists()


def test_population_that_meets_an_error_stops_and_faults_go_on(pager: Pager, folder: Path, peer: Callable[[], Peer]) -> None:
    def broken(offset: int, length: int) -> bytes | None:
        if offset <= 100 * PAGE < offset + length:
            raise OSError(5, "Input/output error")
        return supply(offset, length)

    pager.listen(folder / "s", CallbackSource(broken, size=SIZE), Policy(populate="background", fault_around=PAGE))
    vm = peer()
    name = started(pager, vm, folder / "s")
    stopped = wait_for(pager, PopulationStopped, vm=name)
    assert stopped.address == vm.hva + 100 * PAGE, "all before it has come"
    assert "OSError: [Errno 5] Input/output error" in stopped.reason
    assert [vm.read(page) for page in range(PAGES) if page != 100] == [first_byte(page) for page in range(PAGES) if page != 100]


def test_a_vm_of_another_size_is_refused_with_both_sizes(pager: Pager, folder: Path, peer: Callable[[], Peer]) -> None:
    pager.listen(folder / "s", CallbackSource(supply, size=SIZE))
    vm = peer()
    vm.map(SIZE + PAGE)
    vm.introduce(folder / "s")
    reason = wait_for(pager, Refused).reason
    assert str(SIZE) in reason
    assert str(SIZE + PAGE) in reason


def test_one_source_serves_two_pagers_and_outlives_the_first(folder: Path, peer: Callable[[], Peer]) -> None:
    source = CallbackSource(supply, size=SIZE)
    with Pager() as second:
        with Pager() as first:
            for pager, name in ((first, "first"), (second, "second")):
                pager.listen(folder / name, source, ONE)
            one, other = peer(), peer()
            started(first, one, folder / "first")
            started(second, other, folder / "second")
            assert one.read(3) == other.read(3) == first_byte(3)
        assert one.finish() == -9
        assert other.read(4) == first_byte(4)
    with Pager() as third:
        third.listen(folder / "third", source, ONE)
        again = peer()
        started(third, again, folder / "third")
        assert again.read(5) == first_byte(5)


def test_pagers_that_come_and_go_leave_nothing(folder: Path, peer: Callable[[], Peer]) -> None:
    source = CallbackSource(supply, size=SIZE)

    def once() -> None:
        vm = peer()
        with Pager() as pager:
            policy = Policy(populate=lambda _vm, touched: None if touched else [(0, 16 * PAGE)], fault_around=PAGE)
            pager.listen(folder / "s", source, policy)
            name = started(pager, vm, folder / "s")
            assert vm.read_all() == [first_byte(page) for page in range(PAGES)]
            vm.child.kill()
            vm.finish()
            wait_for(pager, Ended, vm=name)
        vm.__exit__()

    once()
    gc.collect()
    before = threads(), descriptors()
    for _ in range(5):
        once()
    gc.collect()
    assert settled(lambda: (threads(), descriptors()), before) == before


def test_a_socket_that_cannot_be_had_leaves_no_thread(pager: Pager, folder: Path) -> None:
    before = threading.active_count()
    (folder / "s").touch()
    source = CallbackSource(supply, size=SIZE, name="left over")
    with pytest.raises(LatepageError, match="a file"):
        pager.listen(folder / "s", source)
    source._settle()
    assert threading.active_count() == before


@pytest.mark.parametrize("ends", ["quietly", "in a callback"])
def test_a_program_ends_whatever_its_callbacks_do(folder: Path, peer: Callable[[], Peer], ends: str) -> None:
    program = f"""
import threading
from latepage import CallbackSource, Pager, Policy

inside = threading.Event()

def fn(offset, length):
    inside.set()
    threading.Event().wait()

pager = Pager()
pager.listen({str(folder / "s")!r}, CallbackSource(fn, size={SIZE}), Policy(populate=lambda vm, touched: None))
print("ready", flush=True)
if {ends == "in a callback"}:
    inside.wait()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"ready\n"
        vm = peer()
        if ends == "in a callback":
            vm.map(SIZE)
            vm.introduce(folder / "s")
            vm.touch(3)
        assert child.wait(20) == 0
        assert child.stderr.read() == b""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"size": 0}, "size is 0: give the bytes"),
        ({"size": PAGE + 1}, "multiple of 4 KiB"),
        ({"threads": 0}, "from 1 to 64"),
        ({"batch": 100}, "batch is 100"),
        ({"time_limit": 0}, "seconds above zero, or None"),
        ({"time_limit": float("nan")}, "seconds above zero"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused_with_what_would(given: dict[str, Any], says: str) -> None:
    with pytest.raises(SourceError, match=says):
        CallbackSource(supply, **({"size": SIZE} | given))
    with pytest.raises(SourceError, match="give a function"):
        CallbackSource(supply(0, PAGE), size=SIZE)  # type: ignore[arg-type]
