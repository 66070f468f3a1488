"""What `latepage serve` shows on a terminal: a line for each VM, and the events above them."""

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from latepage.cli.output import listening_or_not
from latepage.events import Event, Failed, Refused, Stall
from latepage.memory import format_size
from latepage.pager import Pager
from latepage.source import Source

__all__ = ["ProgressView"]

SHOWN = 20
"""VMs that have a line of their own; the others are counted."""


class ProgressView:
    """A live table of the VMs that are being served, and their events in the order in which they came."""

    def __init__(self, pager: Pager, socket: Path, source: Source) -> None:
        self._pager = pager
        self._title = f"{source} ({format_size(source.size)}) at {socket}"
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        with listening_or_not():
            self._live.start()
        self.refresh()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with listening_or_not():
            self._live.stop()

    def watch(self, event: Event) -> None:
        """Prints an event above the table."""
        said = {name: value for name, value in event.as_dict().items() if name not in ("event", "at")}
        if "address" in said:
            said["address"] = f"{said['address']:#x}"
        if "size" in said:
            said["size"] = format_size(said["size"])
        style = "bold red" if isinstance(event, Failed | Refused | Stall) else "cyan"
        clock = time.strftime("%H:%M:%S", time.localtime(event.at))
        rest = "  ".join(f"[dim]{name}[/] {escape(str(value))}" for name, value in said.items())
        with listening_or_not():
            self._console.print(f"[dim]{clock}[/] [{style}]{event.event}[/]  {rest}", soft_wrap=True, highlight=False)

    def refresh(self) -> None:
        """Draws the table anew."""
        table = self._table()
        with listening_or_not():
            self._live.update(table, refresh=True)

    def _table(self) -> RenderableType:
        sessions = self._pager.sessions()
        if not sessions:
            return Text(f"{self._title}: no VM yet", style="dim")
        table = Table(box=None, title=self._title, title_justify="left", title_style="dim", pad_edge=False)
        table.add_column("VM")
        table.add_column("memory", ratio=1)
        for name in ("", "faults", "p50", "p99"):
            table.add_column(name, justify="right")
        for session in sessions[:SHOWN]:
            progress, stats = session.progress, session.stats
            table.add_row(
                escape(session.name),
                ProgressBar(total=progress.total, completed=progress.total - progress.lacking),
                f"{progress.share:4.0%}",
                f"{stats.faults:,}",
                f"{stats.latency.p50 * 1e6:.0f} µs",
                f"{stats.latency.p99 * 1e6:.0f} µs",
            )
        if len(sessions) > SHOWN:
            table.caption = f"and {len(sessions) - SHOWN} more"
        return table
