"""One VM, looked into: its memory by address, its regions, counters, and how long its faults waited."""

from typing import ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import Footer, Static

from latepage.errors import LatepageError
from latepage.memory import format_size
from latepage.observe.top.figures import Rates, VmLook, rates
from latepage.observe.top.reader import Reader, VmGoneError
from latepage.observe.top.show import bar, duration, flow, legend, memory, printable, span

__all__ = ["VmScreen"]

WIDTH = 76
"""Cells of memory in a row: a terminal of 80 columns has room for them."""

ROWS = 16


class VmScreen(Screen[None]):
    """What there is to know about one VM. When it ends, what was seen last stays, and says so."""

    CSS = """
    #trouble { height: auto; padding: 0 1; background: $error; color: $text; display: none; }
    #trouble.shown { display: block; }
    #vm { height: auto; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.pop_screen", "Back"),
        Binding("space", "app.look", "Look now"),
        Binding("q", "app.quit", "Quit"),
    ]

    def __init__(self, reader: Reader, vm: str) -> None:
        super().__init__()
        self._reader = reader
        self._vm = vm
        self._before: VmLook | None = None

    def compose(self) -> ComposeResult:
        """Its widgets."""
        yield Static("", id="trouble")
        with VerticalScroll():
            yield Static(f"asking for {printable(self._vm)} …", id="vm", markup=False)
        yield Footer(compact=True, show_command_palette=False)

    async def look(self) -> None:
        """Asks for the VM once, and shows it."""
        now, trouble = None, ""
        try:
            now = await self._reader.one_vm(self._vm, WIDTH * ROWS)
        except VmGoneError:
            trouble = f"{self._vm} has ended, or needs no pager any more." + (" This is what it was." if self._before else "")
        except LatepageError as error:
            trouble = f"No answer: {error}."
        if not self.query("#vm"):
            return  # the answer came while the screen was left
        self._trouble(trouble)
        if now is not None:
            self.query_one("#vm", Static).update(_about(now, rates(self._before, now, now.vm)))
            self._before = now

    def _trouble(self, text: str) -> None:
        trouble = self.query_one("#trouble", Static)
        trouble.update(Text(printable(text)))
        trouble.set_class(bool(text), "shown")


def _about(look: VmLook, since: Rates | None) -> RenderableType:
    vm = look.vm
    head = Text.assemble(
        (printable(vm.name), "bold"),
        f"   pid {vm.pid}   {format_size(vm.size)} of {vm.backing} memory, pages of {format_size(vm.page_size)}"
        f"   {vm.vcpus} vCPU   {vm.form} handshake   for {span(vm.age)}",
    )
    now = Text.assemble(
        bar(vm),
        f"   {flow(since)}   p50 {duration(vm.p50)}   p99 {duration(vm.p99)}   longest {duration(vm.longest)}",
    )
    return Group(
        head,
        now,
        "",
        memory(look.cells, WIDTH),
        legend(),
        "",
        _beside(_latencies(look), _counters(look)),
        "",
        _regions(look),
    )


def _beside(left: Table, right: Table) -> Table:
    both = Table.grid(padding=(0, 6, 0, 0))
    both.add_row(left, right)
    return both


def _latencies(look: VmLook) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("page", "result"):
        table.add_column(heading)
    for heading in ("faults", "p50", "p99"):
        table.add_column(heading, justify="right")
    for entry in look.latencies:
        style = "dim" if not entry.count else "bold red" if entry.result == "failed" else ""
        table.add_row(
            entry.page_class, entry.result, f"{entry.count:,}", duration(entry.p50), duration(entry.p99), style=style
        )  # fmt: skip
    return table


def _counters(look: VmLook) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("counter", "counter"):
        table.add_column(heading)
        table.add_column("", justify="right")
    counters = list(look.vm.counters.items())
    half = (len(counters) + 1) // 2
    for number in range(half):
        cells: list[str | Text] = []
        for name, count in counters[number::half]:
            style = "dim" if not count else "bold red" if name in {"stalls", "failures"} else ""
            cells += [Text(name, style), Text(f"{count:,}", style)]
        table.add_row(*cells)
    return table


def _regions(look: VmLook) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("region", "guest-physical", "in the VMM", "in the snapshot", "size"):
        table.add_column(heading, justify="right")
    for number, region in enumerate(look.regions):
        gpa = "-" if region["gpa"] is None else f"{region['gpa']:#x}"
        table.add_row(str(number), gpa, f"{region['hva']:#x}", f"{region['offset']:#x}", format_size(region["size"]))
    return table
