"""How `top` writes figures, bars and memory, with rich: the same on the screen and in the table of `--once`."""

import re
from collections.abc import Sequence
from enum import StrEnum

from rich.color import Color
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from latepage.memory import format_size
from latepage.observe.top.figures import Cell, Look, Rates, Vm, rates, total_rates
from latepage.observe.vms import CELL_STATES

__all__ = [
    "COLUMNS",
    "WIDTHS",
    "Column",
    "bar",
    "duration",
    "flow",
    "legend",
    "memory",
    "once",
    "ordered",
    "printable",
    "rate",
    "row",
    "span",
    "totals",
]


class Column(StrEnum):
    """The columns, by the names that `--sort` takes."""

    NAME = "name"
    MEMORY = "memory"
    SIZE = "size"
    LACKING = "lacking"
    FAULTS = "faults"
    P50 = "p50"
    P99 = "p99"
    STALLS = "stalls"
    FAILED = "failed"
    POPULATION = "population"
    AGE = "age"


COLUMNS = {
    Column.NAME: "VM",
    Column.MEMORY: "memory",
    Column.FAULTS: "faults/s",
    Column.P50: "p50",
    Column.P99: "p99",
    Column.STALLS: "stalls",
    Column.FAILED: "failed",
    Column.POPULATION: "populated/s",
    Column.LACKING: "lacking",
    Column.SIZE: "size",
    Column.AGE: "age",
}
"""What stands above each, from left to right: what matters most is seen on 80 columns too."""

WIDTHS = {
    Column.MEMORY: 21,
    Column.FAULTS: 9,
    Column.P50: 6,
    Column.P99: 6,
    Column.STALLS: 7,
    Column.FAILED: 7,
    Column.POPULATION: 12,
    Column.LACKING: 10,
    Column.SIZE: 10,
    Column.AGE: 6,
}
"""Characters of each on the screen, so that nothing jumps there; a VM's name takes what it needs."""

BAR = 16

STATE_COLOURS = {
    "present": (0x3F, 0xB9, 0x50),
    "removed": (0x58, 0xA6, 0xFF),
    "failed": (0xF8, 0x51, 0x49),
    "lacking": (0x30, 0x36, 0x3D),
}
"""Red, green and blue of each state of memory."""


def printable(text: str) -> str:
    r"""What comes from elsewhere, without what would lead a terminal.

    >>> printable("vm-7\x1b[2J")
    'vm-7?[2J'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def duration(seconds: float) -> str:
    """A wait, in the unit that suits it.

    >>> duration(0), duration(0.0000123), duration(0.00123), duration(0.0123), duration(12.3)
    ('-', '12 µs', '1.2 ms', '12 ms', '12.3 s')
    """
    if not seconds:
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1e-2:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def span(seconds: float) -> str:
    """How long something has been there.

    >>> span(7.9), span(187), span(7260), span(90000)
    ('7s', '3m07s', '2h01m', '1d01h')
    """
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole // 60 % 60:02}m"
    return f"{whole // 86_400}d{whole // 3600 % 24:02}h"


def rate(per_second: float | None) -> str:
    """Something a second; unknown until there were two looks.

    >>> rate(None), rate(0), rate(0.25), rate(12345.6)
    ('', '0', '0.2', '12,346')
    """
    if per_second is None:
        return ""
    return f"{per_second:.1f}" if 0 < per_second < 10 else f"{per_second:,.0f}"


def flow(since: Rates | None) -> str:
    """What happened in a second, in words."""
    faults, population = ("-", "-") if since is None else (rate(since.faults), rate(since.population))
    return f"faults {faults}/s   populated {population} pages/s"


def bar(vm: Vm) -> Text:
    """How much of its memory a VM has: green when nothing is lacking, red where pages could not be had."""
    share = vm.pages.share
    # It is full when nothing is lacking, not when it rounds to that.
    cells = BAR if share == 1 else min(BAR - 1, round(share * BAR))
    colour = "red" if vm.pages.failed else "green" if share == 1 else "cyan"
    shown = "100%" if share == 1 else f"{min(99, int(share * 100))}%"
    return Text.assemble(("━" * cells, colour), ("─" * (BAR - cells), "bright_black"), f" {shown:>4}")


def row(vm: Vm, since: Rates | None) -> list[Text]:
    """A VM's cells, in the order of `COLUMNS`."""
    stalls, failed = vm.counters["stalls"], vm.pages.failed
    return [
        Text(printable(vm.name)),
        bar(vm),
        _right(rate(None if since is None else since.faults)),
        _right(duration(vm.p50)),
        _right(duration(vm.p99)),
        _right(f"{stalls:,}", "bold red" if stalls else ""),
        _right(f"{failed:,}", "bold red" if failed else ""),
        _right(rate(None if since is None else since.population)),
        _right(format_size(vm.pages.lacking * vm.page_size) if vm.pages.lacking else "-"),
        _right(format_size(vm.size)),
        _right(span(vm.age)),
    ]


def _right(text: str, style: str = "") -> Text:
    return Text(text, style, justify="right")


def ordered(vms: Sequence[tuple[Vm, Rates | None]], column: Column, *, reverse: bool) -> list[tuple[Vm, Rates | None]]:
    """VMs in the order of a column: what needs a look first stands above, names from A to Z."""

    def key(entry: tuple[Vm, Rates | None]) -> float:
        vm, since = entry
        match column:
            case Column.MEMORY:
                return vm.pages.share
            case Column.SIZE:
                return -vm.size
            case Column.LACKING:
                return -vm.pages.lacking * vm.page_size
            case Column.FAULTS:
                return 0 if since is None else -since.faults
            case Column.P50:
                return -vm.p50
            case Column.P99:
                return -vm.p99
            case Column.STALLS:
                return -vm.counters["stalls"]
            case Column.FAILED:
                return -vm.pages.failed
            case Column.POPULATION:
                return 0 if since is None else -since.population
            case Column.AGE:
                return vm.age
            case Column.NAME:
                return 0

    by_name = sorted(vms, key=lambda entry: _natural(entry[0].name))
    result = sorted(by_name, key=key)
    return result[::-1] if reverse else result


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key in whose order vm-9 stands before vm-10."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def totals(before: Look | None, now: Look) -> Text:
    """Two lines about the pager."""
    since = total_rates(before, now)
    full = sum(vm.pages.lacking == 0 for vm in now.vms)
    events, counters = now.events, now.counters
    state = ("ready", "bold green") if now.ready else ("takes no new VM", "bold yellow")
    where = "".join(printable(f"{source} at {socket}") for socket, source in now.sockets[:1]) or "listening nowhere yet"
    where += f", and {len(now.sockets) - 1} more" if len(now.sockets) > 1 else ""

    def bad(count: int, what: str) -> tuple[str, str]:
        return f"   {count:,} {what}", "bold red" if count else ""

    return Text.assemble(
        (f"latepage {now.latepage}", "bold"), f"   pid {now.pid}   ", state, f"   {where}\n",
        f"{len(now.vms)} VMs, {full} full   ",
        f"{events['session-started']:,} came, {events['ended']:,} ended",
        bad(events["refused"], "refused"), "\n",
        flow(since), "   ",
        f"installed {format_size(round(since.bytes)) if since else '-'}/s   p50 {duration(now.p50)}   p99 {duration(now.p99)}",
        bad(counters["stalls"], "stalls"), bad(counters["failures"], "pages failed"),
    )  # fmt: skip


def memory(cells: Sequence[Cell], width: int) -> Text:
    """A VM's memory by address, two rows of cells to a line, each in the mixture of its pages' colours."""
    rows = [cells[start : start + width] for start in range(0, len(cells), width)]
    drawn = Text()
    for upper, lower in zip(rows[::2], [*rows[1::2], ()], strict=False):
        for column, cell in enumerate(upper):
            below = _colour(lower[column]) if column < len(lower) else None
            drawn.append("▀", Style(color=_colour(cell), bgcolor=below))
        drawn.append("\n")
    drawn.rstrip()
    return drawn


def _colour(cell: Cell) -> Color:
    pages = sum(cell) or 1
    mixed = [sum(count * STATE_COLOURS[state][part] for count, state in zip(cell, CELL_STATES, strict=True)) for part in range(3)]
    # A single page that could not be had must be seen among thousands that came.
    if cell[CELL_STATES.index("failed")]:
        return Color.from_rgb(*STATE_COLOURS["failed"])
    return Color.from_rgb(*(part // pages for part in mixed))


def legend() -> Text:
    """What the colours mean."""
    drawn = Text()
    for state in CELL_STATES:
        drawn.append("■ ", Style(color=Color.from_rgb(*STATE_COLOURS[state]))).append(f"{state}   ", "dim")
    return drawn


def once(before: Look | None, now: Look, column: Column, *, reverse: bool) -> Group:
    """The pager, and one table of all VMs."""
    table = Table(box=None, pad_edge=False)
    for name, heading in COLUMNS.items():
        table.add_column(heading, justify="left" if name in {Column.NAME, Column.MEMORY} else "right", no_wrap=True)
    for vm, since in ordered([(vm, rates(before, now, vm)) for vm in now.vms], column, reverse=reverse):
        table.add_row(*row(vm, since))
    return Group(totals(before, now), table if now.vms else "no VM is served now")
