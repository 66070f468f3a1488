"""A function that says what is populated: what it is told, what becomes of what it names, and of its errors."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from actors.memory_file import PAGE, first_byte
from actors.peer import Peer
from latepage import CallbackSource, ListenError, Pager, PagerError, Policy, Session, TraceEntry, open_source
from latepage.events import Ended, Event, Populated, PopulationStopped, SessionStarted, Warned
from latepage.policy import Order

pytestmark = pytest.mark.needs("/dev/userfaultfd")

PAGES = 256
SIZE = PAGES * PAGE
K = TypeVar("K", bound=Event)


@pytest.fixture
def pager() -> Iterator[Pager]:
    """A pager; what its callbacks ran on is gone with it."""
    before = threading.active_count()
    with Pager() as pager:
        yield pager
    assert threading.active_count() == before


def wait_for(pager: Pager, kind: type[K], **fields: Any) -> K:
    """The next event of that kind with these fields."""
    for event in pager.events(timeout=20):
        if isinstance(event, kind) and all(getattr(event, name) == value for name, value in fields.items()):
            return event
    raise AssertionError(f"no {kind.__name__} came")


@pytest.fixture
def started(pager: Pager, folder: Path, memory_file: Path, peer: Callable[[], Peer]) -> Callable[[Order], tuple[Peer, Session]]:
    """Has a VM served whose population this function directs."""
    sockets: dict[Order, Path] = {}

    def start(order: Order) -> tuple[Peer, Session]:
        if order not in sockets:
            sockets[order] = folder / f"s{len(sockets)}"
            pager.listen(sockets[order], open_source(memory_file), Policy(populate=order, fault_around=PAGE))
        vm = peer()
        vm.map(SIZE)
        name = vm.introduce(sockets[order], form="latepage")
        wait_for(pager, SessionStarted, vm=name)
        return vm, pager.session(name)

    return start


class Watch:
    """A callback that keeps what it was told, and says what it was given to say."""

    def __init__(self, answer: Callable[[Session, Sequence[TraceEntry]], Iterable[tuple[int, int]] | None]) -> None:
        self._answer = answer
        self._news = threading.Condition()
        self.told: list[tuple[str, list[int]]] = []

    def __call__(self, session: Session, touched: Sequence[TraceEntry]) -> Iterable[tuple[int, int]] | None:
        with self._news:
            self.told.append((session.name, [entry.page for entry in touched]))
            self._news.notify_all()
        return self._answer(session, touched)

    def pages(self, name: str) -> list[int]:
        return [page for vm, pages in self.told if vm == name for page in pages]

    def wait(self, until: Callable[[], bool]) -> None:
        with self._news:
            assert self._news.wait_for(until, timeout=20), self.told


def test_what_it_names_at_the_start_comes_before_anyone_asks_and_in_that_order(
    pager: Pager, started: Callable[[Order], tuple[Peer, Session]]
) -> None:
    watch = Watch(lambda _session, touched: None if touched else [(8 * PAGE, 4 * PAGE), (0, PAGE), (100 * PAGE, 156 * PAGE)])
    vm, session = started(watch)
    watch.wait(lambda: bool(watch.told))
    assert watch.told[0] == (session.name, [])
    while session.progress.present < 161:
        vm.read(101)  # it is there soon
    brought = [entry for entry in session.trace()[0] if entry.reason == "population"]
    assert [page for entry in brought for page in range(entry.page, entry.page + entry.pages)][:6] == [8, 9, 10, 11, 0, 100]
    assert session.progress.lacking == PAGES - 161, "and nothing else has come"


def test_it_is_told_every_touch_once_and_in_order_and_what_it_names_then_comes(
    pager: Pager, started: Callable[[Order], tuple[Peer, Session]]
) -> None:
    def next_page(session: Session, touched: Sequence[TraceEntry]) -> Iterator[tuple[int, int]]:
        for entry in touched:
            yield (entry.page + 1) * PAGE, PAGE

    watch = Watch(next_page)
    vm, session = started(watch)
    for page in (10, 50, 30):
        assert vm.read(page) == first_byte(page)
    vm.discard(10)
    assert vm.read(10) == 0
    watch.wait(lambda: len(watch.pages(session.name)) == 4)
    assert watch.pages(session.name) == [10, 50, 30, 10]
    while session.progress.present < 6:
        vm.read(50)  # they come soon
    states = session.pages()
    assert {page for page in range(PAGES) if states[page]} == {10, 11, 30, 31, 50, 51}
    assert vm.read_all()[30:52:21] == [first_byte(30), first_byte(51)]


def test_an_idle_vm_is_not_asked_about(pager: Pager, started: Callable[[Order], tuple[Peer, Session]]) -> None:
    watch = Watch(lambda _session, _touched: [(0, 4 * PAGE)])
    (idle, first), (busy, second) = started(watch), started(watch)
    idle.read(100)
    watch.wait(lambda: watch.pages(first.name) == [100])
    for page in range(100, 110):
        busy.read(page)
        # Each is a batch of its own: the idle VM has been looked at as often.
        watch.wait(lambda page=page: page in watch.pages(second.name))  # type: ignore[misc]
    calls = [pages for name, pages in watch.told if name == first.name]
    assert calls == [[], [100]], "once at its start, and once for what it touched; what was populated is no touch"


def test_an_error_is_told_and_its_vm_goes_on_without_and_others_with_it(
    pager: Pager, started: Callable[[Order], tuple[Peer, Session]], caplog: pytest.LogCaptureFixture
) -> None:
    bad: list[str] = []

    def sometimes(session: Session, touched: Sequence[TraceEntry]) -> Iterator[tuple[int, int]]:
        if not bad or session.name in bad:
            bad.append(session.name)
            raise KeyError("no plan")
        yield 0, SIZE

    watch = Watch(sometimes)
    vm, session = started(watch)
    warned = wait_for(pager, Warned)
    assert warned.what.startswith(f"{session.name}: population callback Watch: nothing more is populated for this VM")
    assert warned.what.endswith("KeyError: 'no plan'")
    assert [vm.read(page) for page in (1, 2, 3)] == [first_byte(page) for page in (1, 2, 3)]
    other, good = started(watch)
    assert good.wait_populated(20)
    assert other.read(200) == first_byte(200)
    # A whole VM later it would have been told.
    assert watch.told.count((session.name, [])) == 1
    assert watch.pages(session.name) == []
    assert [record.exc_info is not None for record in caplog.records if record.name == "latepage"] == [True]


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ([(0, PAGE), (SIZE - PAGE, 2 * PAGE), (SIZE, PAGE)], "it named 8192 bytes at offset 0xff000, and 1 more such ranges"),
        ([(0, PAGE), (1 << 40, 5)], "it named 5 bytes at offset 0x10000000000, which the VM's memory of 1 MiB does not have"),
    ],
)
def test_ranges_outside_memory_are_told_of_and_left_out(
    pager: Pager, started: Callable[[Order], tuple[Peer, Session]], named: Any, says: str
) -> None:
    vm, session = started(Watch(lambda _session, _touched: named))
    assert says in wait_for(pager, Warned).what
    while session.progress.present < 1:
        vm.read(0)
    assert session.progress.lacking == PAGES - 1


@pytest.mark.parametrize("named", [[(0, -1)], [(-PAGE, PAGE)], [7], [(0, 1, 2)], [("0", 4096)], 5, [(1 << 63, 1)]])
def test_what_is_no_range_is_an_error_that_names_it(
    pager: Pager, started: Callable[[Order], tuple[Peer, Session]], named: Any
) -> None:
    started(Watch(lambda _session, _touched: named))
    says = f"it named {named[0]!r}, and a range is a pair" if isinstance(named, list) else "TypeError"
    assert says in wait_for(pager, Warned).what


def test_a_source_that_fails_stops_the_population_once(pager: Pager, folder: Path, peer: Callable[[], Peer]) -> None:
    def broken(offset: int, length: int) -> bytes:
        if offset + length > 200 * PAGE:
            raise OSError("gone")
        return b"x" * length

    watch = Watch(lambda _session, _touched: [(200 * PAGE, PAGE), (0, PAGE)])
    pager.listen(folder / "s", CallbackSource(broken, size=SIZE), Policy(populate=watch, fault_around=PAGE))
    vm = peer()
    vm.map(SIZE)
    name = vm.introduce(folder / "s", form="latepage")
    stopped = wait_for(pager, PopulationStopped, vm=name)
    assert stopped.address == vm.hva + 200 * PAGE
    assert vm.read(3) == ord("x")
    watch.wait(lambda: watch.pages(name) == [3])
    vm.child.kill()
    wait_for(pager, Ended, vm=name)
    assert not [event for event in pager.events(timeout=0) if isinstance(event, PopulationStopped)]


def test_what_waits_for_a_pager_is_refused_and_what_does_not_is_not(
    pager: Pager, started: Callable[[Order], tuple[Peer, Session]]
) -> None:
    refused: list[str] = []

    def calls_back(session: Session, _touched: Sequence[TraceEntry]) -> None:
        assert session.progress.total == PAGES
        session.populate([(0, PAGE)])
        for call in (session.wait_populated, pager.close):
            try:
                call()
            except PagerError as error:
                refused.append(str(error))

    watch = Watch(calls_back)
    vm, session = started(watch)
    assert vm.read(9) == first_byte(9)
    watch.wait(lambda: watch.pages(session.name) == [9])
    assert all("population callback Watch" in text for text in refused)
    assert len(refused) >= 2


def test_closing_does_not_wait_for_a_callback_that_hangs(folder: Path, memory_file: Path, peer: Callable[[], Peer]) -> None:
    inside, let_go = threading.Event(), threading.Event()

    def hangs(_session: Session, _touched: Sequence[TraceEntry]) -> None:
        inside.set()
        let_go.wait(60)

    with Pager() as pager:
        pager.listen(folder / "s", open_source(memory_file), Policy(populate=hangs))
        vm = peer()
        vm.map(SIZE)
        vm.introduce(folder / "s")
        assert inside.wait(20)
        assert vm.read_all() == [first_byte(page) for page in range(PAGES)], "faults are served all the same"
        wait_for(pager, Populated)
    (left,) = [thread for thread in threading.enumerate() if "population callback" in thread.name]
    assert left.daemon
    let_go.set()
    left.join(20)
    assert not left.is_alive()


def test_a_socket_that_cannot_be_had_leaves_no_thread(pager: Pager, folder: Path, memory_file: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ListenError, match="none/s"):
        pager.listen(folder / "none" / "s", open_source(memory_file), Policy(populate=lambda _session, _touched: None))
    assert threading.active_count() == before


def test_a_policy_with_a_callback_keeps_a_trace_and_is_told_apart() -> None:
    def order(_session: Session, _touched: Sequence[TraceEntry]) -> None: ...

    assert Policy(populate=order).trace == 65_536
    assert Policy(populate=order, trace=100).trace == 100
    assert Policy(populate=order).as_dict()["populate"] == "none"
    assert len({Policy(populate=order), Policy(populate=order), Policy()}) == 2
