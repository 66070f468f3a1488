"""The screen of `latepage top`: totals above, a row for each VM below."""

import asyncio
import time
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Static
from textual.widgets.data_table import CellDoesNotExist

from latepage.errors import LatepageError
from latepage.observe.top.detail import VmScreen
from latepage.observe.top.figures import Look, Rates, Vm, rates
from latepage.observe.top.reader import Reader
from latepage.observe.top.show import COLUMNS, WIDTHS, Column, ordered, printable, row, totals

__all__ = ["TopApp"]


class VmTable(DataTable[Text]):
    """A row for each VM."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select_cursor", "Look into")]


class TopApp(App[None]):
    """Looks at a pager again and again, and shows what it saw.

    Args:
        reader: whom it asks.
        where: the pager's address, for a person.
        interval: seconds between two looks.
        column: by which the VMs are sorted at first.
        reverse: whether the other way round.
    """

    TITLE = "latepage top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #totals { height: auto; padding: 0 1; }
    #trouble { height: auto; padding: 0 1; background: $error; color: $text; display: none; }
    #trouble.shown { display: block; }
    VmTable { height: 1fr; }
    VmTable.stale { opacity: 50%; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "sort('name')", "Name"),
        Binding("m", "sort('memory')", "Memory"),
        Binding("f", "sort('faults')", "Faults/s"),
        Binding("p", "sort('p99')", "p99"),
        Binding("s", "sort('stalls')", "Stalls"),
        Binding("o", "sort('population')", "Populated/s"),
        Binding("a", "sort('age')", "Age"),
        Binding("r", "reverse", "Reverse"),
        Binding("space", "look", "Look now"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(
        self,
        reader: Reader,
        where: str,
        *,
        interval: float = 1.0,
        column: Column = Column.NAME,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.interval = interval
        self._one_at_a_time = asyncio.Lock()
        self._where = where
        self._column = column
        self._reverse = reverse
        self._before: Look | None = None
        self._now: Look | None = None
        self._gone: LatepageError | None = None

    def compose(self) -> ComposeResult:
        """Its widgets."""
        yield Static("", id="totals")
        yield Static("", id="trouble")
        yield VmTable(cursor_type="row", zebra_stripes=True)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Begins to look."""
        self.theme = "textual-dark"
        table = self._table
        for name, heading in COLUMNS.items():
            table.add_column(self._heading(name, heading), key=name, width=WIDTHS.get(name))
        table.focus()
        self.query_one("#totals", Static).update(f"asking {self._where} …")
        self.run_worker(self._look_on(), name="looking", exit_on_error=True)

    @property
    def _table(self) -> VmTable:
        # The table stays below when a VM's screen is above it.
        return self.screen_stack[0].query_one(VmTable)

    @property
    def _ending(self) -> bool:
        """Whether the widgets are going, or gone: the answer came while the screen is being left."""
        return not any(screen.query(VmTable) for screen in self.screen_stack)

    async def _look_on(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self.interval)

    async def look(self) -> None:
        """Asks the pager once, and shows what it says, or that it says nothing."""
        async with self._one_at_a_time:
            seen: Look | LatepageError
            try:
                seen = await self.reader.all_vms()
            except LatepageError as error:
                seen = error
            if self._ending:
                return
            if isinstance(seen, LatepageError):
                self._lost(seen)
            else:
                self._found(seen)
            screen = self.screen
            if isinstance(screen, VmScreen):
                await screen.look()

    def _lost(self, error: LatepageError) -> None:
        self._gone = error
        seen = "" if self._now is None else f" What is shown is of {time.strftime('%H:%M:%S', time.localtime(self._now.at))}."
        self._trouble(f"No answer: {error}. It is asked again every {self.interval:g} s.{seen}")
        self._table.set_class(True, "stale")

    def _found(self, now: Look) -> None:
        if self._gone is not None:
            another = self._now is not None and self._now.pid != now.pid
            self.notify("another pager answers now" if another else "the pager answers again", timeout=5)
            # The time without an answer belongs to no second.
            self._now = None
        self._gone = None
        self._trouble("")
        self._table.set_class(False, "stale")
        self._before, self._now = self._now, now
        self._show()

    def _trouble(self, text: str) -> None:
        for screen in self.screen_stack:
            trouble = screen.query_one("#trouble", Static)
            trouble.update(Text(printable(text)))
            trouble.set_class(bool(text), "shown")

    def _show(self) -> None:
        now = self._now
        if now is None:
            return
        self.screen_stack[0].query_one("#totals", Static).update(totals(self._before, now))
        entries = ordered([(vm, rates(self._before, now, vm)) for vm in now.vms], self._column, reverse=self._reverse)
        self._fill(entries)

    def _fill(self, entries: Sequence[tuple[Vm, Rates | None]]) -> None:
        """Brings the table to what it should be, the cursor staying with its VM."""
        table = self._table
        chosen = self._chosen()
        names = [vm.name for vm, _ in entries]
        for gone in {str(key.value) for key in table.rows} - set(names):
            table.remove_row(gone)
        for vm, since in entries:
            cells = row(vm, since)
            if vm.name not in table.rows:
                table.add_row(*cells, key=vm.name)
                continue
            for name, cell in zip(COLUMNS, cells, strict=True):
                if table.get_cell(vm.name, name) != cell:
                    table.update_cell(vm.name, name, cell)
        # The table gives the cells of a row to sort by, and not its key.
        place = {printable(name): number for number, name in enumerate(names)}
        table.sort(key=lambda cells: place[cells[0].plain])
        if chosen is not None and chosen in table.rows:
            table.move_cursor(row=table.get_row_index(chosen), animate=False, scroll=False)

    def _chosen(self) -> str | None:
        """The VM that the cursor is on."""
        table = self._table
        try:
            return str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value)
        except CellDoesNotExist:
            return None

    def _heading(self, name: Column, heading: str) -> Text:
        # Figures stand to the right, and an arrow says what they are sorted by.
        arrow = ("▲" if self._reverse else "▼") if name == self._column else ""
        return Text(heading + arrow, justify="left" if name in {Column.NAME, Column.MEMORY} else "right")

    def _sorted_anew(self) -> None:
        table = self._table
        for key, column in table.columns.items():
            name = Column(str(key.value))
            column.label = self._heading(name, COLUMNS[name])
        self._show()
        table.refresh()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """What the table is asked for is not offered where there is none."""
        if action in {"sort", "reverse"} and isinstance(self.screen, VmScreen):
            return False
        return super().check_action(action, parameters)

    def action_sort(self, column: str) -> None:
        """Sorts by a column."""
        self._column = Column(column)
        self._reverse = False
        self._sorted_anew()

    def action_reverse(self) -> None:
        """Turns the order round."""
        self._reverse = not self._reverse
        self._sorted_anew()

    async def action_look(self) -> None:
        """Looks now."""
        await self.look()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """A click on a heading sorts by it; a second one turns the order round."""
        column = Column(str(event.column_key.value))
        if column == self._column:
            self.action_reverse()
        else:
            self.action_sort(column)

    async def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Looks into a VM."""
        screen = VmScreen(self.reader, str(event.row_key.value))
        await self.push_screen(screen)
        await screen.look()
