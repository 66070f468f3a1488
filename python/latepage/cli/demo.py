"""`latepage demo`: one VM, saved once and restored three ways, with the figures and a picture of each."""

import json as jsonlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from latepage.cli.sizes import Size
from latepage.errors import LatepageError
from latepage.kvm import Job, VmProcess
from latepage.memory import format_size
from latepage.observe.trace_file import Trace, read_trace

__all__ = ["Demo", "Way", "demo"]

SEED = 7
ORDER = 11


@dataclass(frozen=True, slots=True)
class Way:
    """What came of one way to restore. Times are in seconds since the VMM began to restore.

    Attributes:
        way: its name.
        guest: `kvm`, or `threads` that stand in for a guest.
        first_instruction: when the guest ran its first instruction.
        tenth_verified: when it had verified a tenth of its memory, in random order.
        all_verified: when it had verified all of it.
        bytes_moved: bytes that were copied into its memory.
        faults: page faults while it ran: the VMM process's own, or those that the pager served.
        wrong_pages: pages that were not what had been saved.
        curve: pairs of seconds and of the share that was verified by then.
        began: when the VMM began to restore, in seconds since 1970.
    """

    way: str
    guest: str
    first_instruction: float
    tenth_verified: float
    all_verified: float
    bytes_moved: int
    faults: int
    wrong_pages: int
    curve: list[tuple[float, float]]
    began: float


@dataclass(frozen=True, slots=True)
class Demo:
    """All of it.

    Attributes:
        memory: bytes of guest memory.
        ways: the three ways.
        seconds: how long the demo took.
        picture: where it lies, if it could be drawn.
    """

    memory: int
    ways: list[Way]
    seconds: float
    picture: str | None


app = App(
    name="demo",
    help_epilogue="It boots a VM, fills its memory, saves it, and restores it three ways: read in first, mapped, and through "
    "latepage. Each time the restored guest verifies all of its memory in random order, with the memory file in the page cache.",
)


@app.default
def demo(
    *,
    memory: Size = 256 << 20,
    output: Path = Path("demo"),
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """Boot a VM, fill its memory, save it, and restore it three ways: read in first, mapped, and through latepage.

    Args:
        memory: of the VM, a multiple of 2 MiB.
        output: a folder for the picture (demo.png) and the figures (demo.json).
        json: print the figures as JSON instead of a table.
    """
    wrong = _misunderstood(memory, output)
    if wrong is not None:
        print(f"latepage demo: {wrong}", file=sys.stderr)
        return 2
    began = time.monotonic()
    # Standard output is for the result alone.
    console = Console(stderr=True)
    shown = Progress(
        TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
        console=console,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="latepage-demo-") as name, shown:
        folder = Path(name)
        _boot(folder, memory, _bar(shown, "boot, fill and save"))
        ways = [
            _restore(folder, "read in first", memory, _bar(shown, "restore: memory read in first"), read=True),
            _restore(folder, "mapped lazily", 0, _bar(shown, "restore: memory mapped lazily"), read=False),
        ]
        ours, trace, shift = _through_latepage(folder, _bar(shown, "restore: through latepage serve"))
    ways.append(ours)
    output.mkdir(parents=True, exist_ok=True)
    picture = _draw(ways, trace, shift, memory, output / "demo.png", console)
    result = Demo(memory, ways, time.monotonic() - began, picture)
    figures = jsonlib.dumps(asdict(result), indent=2)
    (output / "demo.json").write_text(figures + "\n")
    if json:
        print(figures)
    else:
        _table(result)
    return 1 if any(way.wrong_pages for way in ways) else 0


def _misunderstood(memory: int, output: Path) -> str | None:
    """What is wrong with the flags, if anything is."""
    if memory < 4 << 20 or memory % (2 << 20):
        return f"--memory is {memory} bytes: give a multiple of 2MiB, at least 4MiB"
    for path in (output, *output.parents):
        if path.exists():
            return None if path.is_dir() else f"--output {output}: {path} is no folder; name a folder, or one to be made"
    return None


Show = Callable[[float], None]


def _bar(shown: Progress, name: str) -> Show:
    """A bar of its own; what it gives back sets it to a share from 0 to 1."""
    task: TaskID = shown.add_task(name, total=1.0, start=False)

    def show(share: float) -> None:
        shown.start_task(task)
        shown.update(task, completed=share)
        if share >= 1:
            shown.stop_task(task)

    return show


def _boot(folder: Path, memory: int, show: Show) -> None:
    show(0)
    saved = (folder / "vm.state", folder / "vm.mem")
    with VmProcess.create(Job("fill", seed=SEED), memory=memory, name="demo", save=saved) as vm:
        for event in vm.events():
            if event["event"] == "progress":
                show(0.9 * event["done"] / event["pages"])
            elif event["event"] == "saved":
                show(1)
        if vm.wait() != 0:
            raise LatepageError("the VM could not be filled and saved; try `latepage vm run`")


def _restore(folder: Path, way: str, moved: int, show: Show, *, read: bool) -> Way:
    show(0)
    origin = {"read" if read else "map_file": folder / "vm.mem"}
    with VmProcess.restore(folder / "vm.state", _verify(), name="demo", **origin) as vm:  # type: ignore[arg-type]
        return _watch(vm, way, moved, show)


def _verify() -> Job:
    return Job("verify", seed=ORDER, order="random", progress_every=256)


def _watch(vm: VmProcess, way: str, moved: int, show: Show) -> Way:
    """Follows a VM that verifies its memory, to the end."""
    first, faults, guest, began = 0.0, 0, "", 0.0
    for event in vm.events():
        match event["event"]:
            case "started":
                guest, faults = event["guest"], _page_faults(vm.pid)
                began = event["origin_monotonic_ns"] / 1e9 + time.time() - time.monotonic()
            case "first_instruction":
                first = event["ns"] / 1e9
            case "progress":
                show(event["done"] / event["pages"])
            case "failed":
                raise LatepageError(f"{way}: {event['error']}", vm="demo")
            case "job_done":
                show(1)
                faults = _page_faults(vm.pid) - faults
                report = event["report"]
                curve = [(first, 0.0), *((ns / 1e9, done / report["pages"]) for done, ns in report["marks"])]
                end = report["ended_ns"] / 1e9
                curve.append((end, 1.0))
                tenth = next(seconds for seconds, share in curve if share >= 0.1)
                return Way(way, guest, first, tenth, end, moved, faults, report["wrong_pages"], curve, began)
    raise LatepageError(f"{way}: the VM ended before it had verified its memory", vm="demo")


def _page_faults(pid: int) -> int:
    """Those that a process took so far, minor and major (proc(5), fields 10 and 12)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7]) + int(fields[9])


def _through_latepage(folder: Path, show: Show) -> tuple[Way, Trace, float]:
    """The third way: the way itself, the pager's trace, and from when the trace counts."""
    show(0)
    command = [
        *(sys.executable, "-m", "latepage", "serve", str(folder / "pager.sock"), str(folder / "vm.mem")),
        *("--populate", "background", "--record", str(folder), "--json"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pager:
        try:
            _event(pager, "listening")
            with VmProcess.restore(folder / "vm.state", _verify(), pager=folder / "pager.sock", name="demo") as vm:
                way = _watch(vm, "through latepage", 0, show)
            # The VM counts from the start of its restore, the trace from the handshake.
            shift = _event(pager, "session-started")["at"] - way.began
            _event(pager, "ended")
            pager.send_signal(signal.SIGTERM)
            pager.communicate(timeout=30)
        finally:
            pager.kill()
    trace = read_trace(folder / "demo.trace")
    counters = trace.counters
    served = asdict(way) | {"bytes_moved": counters["bytes_installed"], "faults": counters["faults"]}
    return Way(**served), trace, max(0.0, shift)


def _event(pager: "subprocess.Popen[str]", name: str) -> dict[str, Any]:
    """The pager's next event of that name."""
    assert pager.stdout is not None  # noqa: S101 (it was asked for)
    for line in pager.stdout:
        event: dict[str, Any] = jsonlib.loads(line)
        if event["event"] == name:
            return event
        if event["event"] in ("refused", "failed"):
            raise LatepageError(f"latepage serve: {event['reason']}", vm=event.get("vm"))
    raise LatepageError(f"latepage serve ended before it told of {name!r}")


def _draw(ways: list[Way], trace: Trace, shift: float, memory: int, path: Path, console: Console) -> str | None:
    from latepage.observe.heatmap import draw

    ours = ways[-1]
    guest = "a guest on KVM" if ours.guest == "kvm" else "threads that stand in for a guest (no /dev/kvm)"
    try:
        draw(
            trace,
            {way.way: way.curve for way in ways},
            path,
            title=f"A VM of {format_size(memory)} that runs while its memory arrives",
            subtitle=f"latepage demo: {guest}; it runs after {ours.first_instruction * 1e3:.0f} ms and verifies every page in "
            f"random order; {ours.faults:,} faults served, {trace.latency['p50'] * 1e6:.0f} µs each in the pager (median)",
            shift=shift,
        )
    except LatepageError as error:
        console.print(f"no picture: {error}", style="yellow", markup=False)
        return None
    return str(path)


def _table(result: Demo) -> None:
    console = Console()
    kvm = result.ways[0].guest == "kvm"
    guest = "a guest on KVM" if kvm else "ordinary threads stand in for the guest (no /dev/kvm)"
    table = Table(
        title=f"{format_size(result.memory)}, {guest}; the memory file is in the page cache",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("memory", no_wrap=True)
    for name in (
        "first\ninstruction",
        "a tenth\nverified",
        "everything\nverified",
        "bytes\nmoved",
        "page\nfaults",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for way in result.ways:
        table.add_row(
            way.way,
            f"{way.first_instruction * 1e3:,.1f} ms",
            f"{way.tenth_verified:.2f} s",
            f"{way.all_verified:.2f} s",
            format_size(way.bytes_moved) if way.bytes_moved else "0 B",
            f"{way.faults:,}",
            style="bold" if way is result.ways[-1] else "",
        )
    console.print(table)
    wrong = sum(way.wrong_pages for way in result.ways)
    console.print(f"{wrong:,} pages were WRONG" if wrong else "every page was right each time", highlight=False)
    if result.picture:
        console.print(f"which page came when: {result.picture}", highlight=False)
    console.print(f"the demo took {result.seconds:.1f} s", highlight=False)
