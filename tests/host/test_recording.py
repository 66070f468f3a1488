"""Recording: one trace a VM with what its guest did, whole when the VM has ended, readable when the pager was killed."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.lines import PATIENCE
from actors.memory_file import PAGE, first_byte
from actors.peer import Peer
from actors.serve import Serve
from actors.trace_files import write_trace
from latepage import Pager, Policy, open_source
from latepage.errors import TraceError
from latepage.events import Ended, Event, SessionStarted
from latepage.observe import RING, Recorder, Run, merge, read_trace

pytestmark = pytest.mark.needs("/dev/userfaultfd")

PAGES = 256
SIZE = PAGES * PAGE


@pytest.fixture
def traces(folder: Path) -> Path:
    return folder / "traces"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def wait_for(pager: Pager, kind: type[Event], vm: str) -> None:
    for event in pager.events(timeout=20):
        if isinstance(event, kind) and getattr(event, "vm", None) == vm:
            return
    raise AssertionError(f"no {kind.__name__} of {vm} came")


def until(held: Callable[[], bool]) -> None:
    """Waits for what no event tells: that a file has grown, or a thread has gone."""
    deadline = time.monotonic() + PATIENCE
    while not held():
        assert time.monotonic() < deadline
        os.sched_yield()


def touches(trace: Path) -> list[int]:
    """What stands in a file that is being written; nothing if it is not there yet."""
    try:
        return list(read_trace(trace).touches())
    except TraceError:
        return []


def introduced(peer: Callable[[], Peer], socket: Path, name: str, size: int = SIZE) -> Peer:
    vm = peer()
    vm.map(size)
    vm.introduce(socket, form="latepage", name=name)
    return vm


def test_a_trace_tells_what_the_guest_touched_in_its_order(
    serve: Callable[..., Serve], peer: Callable[[], Peer], traces: Path
) -> None:
    pager = serve("--record", str(traces), "--fault-around", "64KiB")
    vm = introduced(peer, pager.socket, "vm-7")
    touched = [200, 3, 77]
    for page in touched:
        assert vm.read(page) == first_byte(page)
    vm.discard(3)
    assert vm.read(3) == 0
    until((traces / "vm-7.trace.part").exists)
    vm.child.kill()
    pager.event("ended", vm="vm-7")
    pager.signal(signal.SIGTERM)
    assert pager.finish() == 0
    assert names(traces) == ["vm-7.trace"]
    trace = read_trace(traces / "vm-7.trace")
    assert (trace.vm, trace.whole, trace.end, trace.lost) == ("vm-7", True, "gone", 0)
    assert (trace.pages, trace.populate, trace.fault_around) == (PAGES, "none", 64 << 10)
    assert trace.source.endswith("guest.mem")
    assert list(trace.touches()) == touched
    runs = list(trace.runs())
    # What came beside a touch is marked as such: the rest of its window of 64 KiB.
    beside = [page for run in runs if run.reason == "beside" for page in range(run.page, run.page + run.pages)]
    assert beside == [*range(201, 208), *range(4, 16), *range(78, 80)]
    assert [(run.page, run.reason) for run in runs if run.reason in ("removed", "cleared")] == [(3, "removed"), (3, "cleared")]
    assert [run.seconds for run in runs] == sorted(run.seconds for run in runs)
    assert trace.counters["faults"] == 4
    assert trace.latency["count"] == 4


def test_population_is_no_touch_and_none_of_it_is_lost(
    serve: Callable[..., Serve], peer: Callable[[], Peer], folder: Path, traces: Path
) -> None:
    pages = 262_144
    source = folder / "large.mem"
    with source.open("wb") as file:
        file.truncate(pages * PAGE)
    # Zero pages are what comes fastest of all.
    pager = serve("--populate", "background", "--record", str(traces), source=source)
    introduced(peer, pager.socket, "vm-7", pages * PAGE)
    pager.event("populated", patience=60, vm="vm-7")
    pager.signal(signal.SIGTERM)
    assert pager.finish(patience=60) == 0
    trace = read_trace(traces / "vm-7.trace")
    assert (trace.whole, trace.end, trace.lost, trace.touches()) == (True, "detached", 0, {})
    assert sum(run.pages for run in trace.runs() if run.reason == "population") == pages
    assert (traces / "vm-7.trace").stat().st_size < 4 * pages


def test_a_trace_is_readable_after_its_pager_was_killed(
    serve: Callable[..., Serve], peer: Callable[[], Peer], traces: Path
) -> None:
    pager = serve("--record", str(traces))
    vm = introduced(peer, pager.socket, "vm-7")
    part = traces / "vm-7.trace.part"
    for page in (200, 3):
        vm.read(page)
    until(lambda: touches(part) == [200, 3])
    pager.child.kill()
    pager.child.wait()
    vm.child.kill()
    assert names(traces) == ["vm-7.trace.part"]
    trace = read_trace(part)
    assert (trace.whole, trace.end, list(trace.touches())) == (False, None, [200, 3])


def test_no_trace_is_overwritten(serve: Callable[..., Serve], peer: Callable[[], Peer], traces: Path) -> None:
    traces.mkdir()
    (traces / "twin.trace").write_text("older")
    (traces / "twin-2.trace.part").write_text("of a pager that was killed")
    pager = serve("--record", str(traces))
    for number in (3, 4):
        vm = introduced(peer, pager.socket, "twin")
        vm.read(1)
        until(lambda number=number: touches(traces / f"twin-{number}.trace.part") == [1])  # type: ignore[misc]
        vm.child.kill()
        pager.event("ended")
    pager.signal(signal.SIGTERM)
    assert pager.finish() == 0
    assert names(traces) == ["twin-2.trace.part", "twin-3.trace", "twin-4.trace", "twin.trace"]
    assert (traces / "twin.trace").read_text() == "older"
    assert read_trace(traces / "twin-4.trace").vm == "twin"


@pytest.mark.parametrize("name", ["..", ".hidden", "-rf", "a.trace"])
def test_a_vms_name_chooses_no_folder_and_hides_no_file(
    serve: Callable[..., Serve], peer: Callable[[], Peer], traces: Path, name: str
) -> None:
    pager = serve("--record", str(traces))
    vm = introduced(peer, pager.socket, name)
    vm.read(1)
    until(lambda: names(traces) != [])
    vm.child.kill()
    pager.event("ended", vm=name)
    pager.signal(signal.SIGTERM)
    assert pager.finish() == 0
    (file,) = names(traces)
    assert file.endswith(".trace")
    assert file[0] not in ".-"


def test_a_full_disk_is_reported_once_and_the_vms_go_on(
    folder: Path, memory_file: Path, peer: Callable[[], Peer], traces: Path
) -> None:
    # A limit on the size of files stands for a disk that is full: the kernel refuses the write.
    with Serve(
        folder / "pager.sock", memory_file, "--record", str(traces), "--fault-around", "4KiB", under=("prlimit", "--fsize=2048")
    ) as pager:
        pager.event("listening")
        vms = [introduced(peer, pager.socket, f"vm-{number}") for number in range(2)]
        for vm in vms:
            assert vm.read_all() == [first_byte(page) for page in range(PAGES)]
            vm.child.kill()
            pager.event("ended")
        pager.signal(signal.SIGTERM)
        assert pager.finish() == 0
        said = pager.said()
    assert said.count("recorded no further") == 1
    assert "File too large; the VM goes on" in said
    assert "2 VMs in all could not be recorded" in said
    for number in range(2):
        trace = read_trace(traces / f"vm-{number}.trace.part")
        assert not trace.whole
        assert 0 < len(trace.touches()) < PAGES


def test_a_folder_that_cannot_be_is_refused_before_anything_is_made(folder: Path, memory_file: Path) -> None:
    with Serve(folder / "pager.sock", memory_file, "--record", str(memory_file)) as pager:
        assert pager.finish() == 1
        assert f"latepage: {memory_file}: is no folder" in pager.said()
    assert sorted(path.name for path in folder.iterdir()) == ["guest.mem", "pager.stderr"]


@pytest.fixture
def pager(folder: Path, memory_file: Path) -> Iterator[Pager]:
    """A pager that records by its policy, and brings nothing unasked."""
    with Pager() as pager:
        pager.listen(folder / "pager.sock", open_source(memory_file), Policy(fault_around=PAGE, trace=RING))
        yield pager


def test_a_recorder_that_ends_first_ends_its_files(pager: Pager, peer: Callable[[], Peer], folder: Path, traces: Path) -> None:
    with Recorder(pager, traces):
        vm = introduced(peer, folder / "pager.sock", "vm-7")
        vm.read(5)
    trace = read_trace(traces / "vm-7.trace")
    assert (trace.whole, trace.end, list(trace.touches())) == (True, "stopped", [5])
    assert vm.read(6) == first_byte(6)


def test_what_overran_the_ring_is_counted_exactly(
    peer: Callable[[], Peer], folder: Path, memory_file: Path, traces: Path
) -> None:
    with Pager() as pager:
        pager.listen(folder / "small.sock", open_source(memory_file), Policy(fault_around=PAGE, trace=16))
        vm = introduced(peer, folder / "small.sock", "vm-7")
        vm.read_all()
        with Recorder(pager, traces):
            vm.discard(0, 4)
    trace = read_trace(traces / "vm-7.trace")
    # A touch is an entry of its own; what was discarded together is one.
    assert trace.lost + len(list(trace.runs())) == PAGES + 1
    assert trace.lost >= PAGES - 16
    assert list(trace.runs())[-1]._replace(seconds=0) == Run(0, 4, "removed", 0)


def test_a_session_without_a_ring_is_named(peer: Callable[[], Peer], folder: Path, memory_file: Path, traces: Path) -> None:
    said: list[str] = []
    with Pager() as pager, Recorder(pager, traces, report=said.append):
        pager.listen(folder / "none.sock", open_source(memory_file))
        introduced(peer, folder / "none.sock", "vm-7")
        wait_for(pager, SessionStarted, "vm-7")
    assert said == ["vm-7: not recorded, since its policy keeps no trace: give it Policy(trace=RING)"]
    assert names(traces) == []


def test_nothing_of_a_recorder_is_left(pager: Pager, peer: Callable[[], Peer], folder: Path, traces: Path) -> None:
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))

    def lives_and_ends(number: int) -> None:
        vm = introduced(peer, folder / "pager.sock", f"vm-{number}")
        with vm:
            vm.read(number)
            if number != 3:
                until(lambda: touches(traces / f"vm-{number}.trace.part") == [number])
        wait_for(pager, Ended, f"vm-{number}")

    lives_and_ends(3)  # what the pager makes once is there from now on
    before = held()
    with Recorder(pager, traces):
        for number in range(3):
            lives_and_ends(number)
    until(lambda: held() == before)
    assert names(traces) == ["vm-0.trace", "vm-1.trace", "vm-2.trace"]


def test_a_folder_that_is_a_file_is_no_folder(pager: Pager, memory_file: Path) -> None:
    with pytest.raises(TraceError, match=r"guest\.mem: is no folder"):
        Recorder(pager, memory_file)


def test_a_merged_trace_gives_a_session_the_order_to_populate_in(
    peer: Callable[[], Peer], folder: Path, memory_file: Path, traces: Path
) -> None:
    order = [(200, 1, "demand", 1), (3, 1, "demand", 2), (4, 1, "demand", 3)]
    merged = merge([read_trace(write_trace(folder / "past.trace", order))])
    with Pager() as pager, Recorder(pager, traces):
        pager.listen(folder / "pager.sock", open_source(memory_file), Policy(trace=RING))
        vm = introduced(peer, folder / "pager.sock", "vm-7")
        wait_for(pager, SessionStarted, "vm-7")
        session = pager.session("vm-7")
        session.populate(merged.ranges())
        until(lambda: session.progress.present == len(order))
        assert vm.read(3) == first_byte(3)
    runs = [(run.page, run.pages) for run in read_trace(traces / "vm-7.trace").runs()]
    assert runs == [(200, 1), (3, 2)]


def test_a_vm_that_is_gone_in_a_moment_has_a_trace_too(
    serve: Callable[..., Serve], peer: Callable[[], Peer], traces: Path
) -> None:
    pager = serve("--record", str(traces))
    for number in range(10):
        vm = introduced(peer, pager.socket, f"vm-{number}")
        vm.read(number)
        vm.child.kill()
        pager.event("ended", vm=f"vm-{number}")
    pager.signal(signal.SIGTERM)
    assert pager.finish() == 0
    assert [list(read_trace(traces / f"vm-{number}.trace").touches()) for number in range(10)] == [[n] for n in range(10)]
