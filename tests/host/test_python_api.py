"""The Python API with a VM at the other end: what a session tells, and what can be asked of it."""

import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.memory_file import PAGE, first_byte
from actors.peer import Peer
from latepage import Pager, PageState, Policy, Session, SessionError, open_source
from latepage.events import Ended, Event, Populated, SessionStarted

pytestmark = pytest.mark.needs("/dev/userfaultfd")

PAGES = 256
SIZE = PAGES * PAGE


@pytest.fixture
def pager(folder: Path, memory_file: Path) -> Iterator[Pager]:
    """A pager that brings nothing unasked, and keeps a trace."""
    with Pager() as pager:
        pager.listen(folder / "pager.sock", open_source(memory_file), Policy(fault_around=PAGE, trace=10_000))
        yield pager


@pytest.fixture
def vm(pager: Pager, folder: Path, peer: Callable[[], Peer]) -> Peer:
    """A VM that is being served."""
    vm = peer()
    vm.map(SIZE)
    vm.introduce(folder / "pager.sock", form="latepage", name="vm-7")
    wait_for(pager, SessionStarted)
    return vm


def wait_for(pager: Pager, kind: type[Event]) -> Event:
    for event in pager.events(timeout=20):
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind.__name__} came")


def test_a_session_tells_who_its_vm_is_and_where_its_memory_lies(pager: Pager, vm: Peer) -> None:
    session = pager.session("vm-7")
    assert (session.name, session.pid, session.form, session.backing) == ("vm-7", vm.pid, "latepage", "anonymous")
    assert [(region.hva, region.size, region.offset, region.pages) for region in session.regions] == [(vm.hva, SIZE, 0, PAGES)]
    assert not session.closed
    with pytest.raises(KeyError):
        pager.session("another")


def test_it_counts_what_the_guest_touched_and_traces_it_in_order(pager: Pager, vm: Peer) -> None:
    touched = [200, 3, 77]
    for page in touched:
        assert vm.read(page) == first_byte(page)
    session = pager.session("vm-7")
    vm.discard(3)
    assert vm.read(3) == 0
    # A thread is released before its fault is written down: once the next is served, that is done.
    vm.read(100)
    assert session.stats.faults == 5
    progress = session.progress
    assert (progress.total, progress.full) == (PAGES, False)
    assert progress.present in (3, 4), "page 100 perhaps not yet"
    assert progress.present + progress.removed + progress.lacking == PAGES
    states = session.pages()
    assert {page for page in range(PAGES) if states[page] == PageState.PRESENT} - {100} == set(touched)
    entries, cursor = session.trace()
    expected = [(200, "demand"), (3, "demand"), (77, "demand"), (3, "removed"), (3, "cleared")]
    assert [(entry.page, entry.reason) for entry in entries][:5] == expected
    assert session.stats.latency.count >= 4
    assert 0 < session.stats.latency.p50 <= session.stats.latency.max
    vm.read(101)
    assert {entry.page for entry in session.trace(cursor)[0]} <= {100, 101}, "nothing is given twice"


def test_a_pagers_totals_never_go_back_when_a_vm_ends(pager: Pager, vm: Peer) -> None:
    for page in (1, 2):
        vm.read(page)
    vm.discard(2)
    vm.read(2)
    vm.child.kill()
    wait_for(pager, Ended)
    assert pager.sessions() == []
    totals = pager.stats
    assert (totals.faults, totals.latency.count) == (3, 3)
    counted = {cell: histogram.count for cell, histogram in totals.faults_by.items() if histogram.count}
    assert counted == {("source", "installed"): 2, ("zero", "installed"): 1}
    for histogram in totals.faults_by.values():
        bounds, counts = zip(*histogram.cumulative, strict=True)
        assert (bounds[0], bounds[-1]) == (1.024e-6, 2**36 / 1e9)
        assert list(counts) == sorted(counts)
        assert counts[-1] == histogram.count, "none of them took a minute"
        assert (histogram.sum > 0) == (histogram.count > 0)


def test_poison_with_firecracker_is_warned_of_once(folder: Path, memory_file: Path, peer: Callable[[], Peer]) -> None:
    with Pager() as pager:
        pager.listen(folder / "poison.sock", open_source(memory_file), Policy(on_missing="poison"))
        for form in ("latepage", "firecracker", "firecracker"):
            vm = peer()
            vm.map(SIZE)
            vm.introduce(folder / "poison.sock", form=form)
            wait_for(pager, SessionStarted)
        told = pager.events_told
    assert (told["session-started"], told["warning"]) == (3, 1)


def test_pages_can_be_brought_ahead_of_their_faults(pager: Pager, vm: Peer) -> None:
    session = pager.session("vm-7")
    assert not session.wait_populated(timeout=0)
    session.populate([(8 * PAGE, 4 * PAGE), (0, PAGE)])
    session.populate()
    assert session.wait_populated(timeout=20)
    wait_for(pager, Populated)
    assert session.progress.full
    brought = [page for entry in session.trace()[0] for page in range(entry.page, entry.page + entry.pages)]
    assert brought[:5] == [8, 9, 10, 11, 0]
    assert vm.read_all() == [first_byte(page) for page in range(PAGES)]
    assert session.stats.faults == 0


def test_a_range_that_the_vm_has_not_is_an_error_with_its_address(pager: Pager, vm: Peer) -> None:
    with pytest.raises(SessionError, match="no offset") as error:
        pager.session("vm-7").populate([(SIZE - PAGE, 2 * PAGE)])
    assert (error.value.vm, error.value.address) == ("vm-7", SIZE)


def test_a_session_can_be_asked_after_its_end(pager: Pager, vm: Peer) -> None:
    session = pager.session("vm-7")
    vm.read(9)
    vm.child.kill()
    wait_for(pager, Ended)
    assert session.closed
    assert pager.sessions() == []
    assert session.stats.faults == 1
    with pytest.raises(SessionError, match="ended") as error:
        session.wait_populated()
    assert error.value.vm == "vm-7"
    with pytest.raises(SessionError, match="over"):
        session.populate()


def test_events_can_be_polled_for(pager: Pager, vm: Peer) -> None:
    poll = select.poll()
    poll.register(pager, select.POLLIN)
    assert list(pager.events(timeout=0)) == []
    assert poll.poll(0) == []
    vm.child.kill()
    assert poll.poll(20_000)
    assert isinstance(wait_for(pager, Ended), Ended)


def test_closing_fails_closed_and_names_whom(pager: Pager, vm: Peer) -> None:
    session: Session = pager.session("vm-7")
    assert pager.close() == ["vm-7"]
    assert vm.finish() == -9
    assert session.closed
    assert pager.close() == []
