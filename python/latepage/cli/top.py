"""`latepage top`: the VMs of a running pager, live."""

import asyncio
import json as jsonlib
import sys
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from latepage.cli.status import valid_address
from latepage.errors import LatepageError
from latepage.observe.address import parse_address

__all__ = ["top"]

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]

Sort = Literal["name", "memory", "size", "lacking", "faults", "p50", "p99", "stalls", "failed", "population", "age"]

app = App(
    name="top",
    help_epilogue="Start the pager with `latepage serve --metrics ADDRESS`. Keys: n m f p s o a sort by name, memory, faults, "
    "p99, stalls, population, age; r turns the order round; Enter looks into a VM, Escape goes back; q ends.",
)


@app.default
def top(
    address: Annotated[str, Parameter(validator=valid_address)],
    /,
    *,
    interval: float = 1.0,
    sort: Sort = "name",
    reverse: Flag = False,
    once: Flag = False,
    json: Flag = False,
) -> int:
    """Show the VMs of the pager at ADDRESS, live: how much of its memory each has, its faults, and how long they wait.

    Args:
        address: what the pager was given as --metrics: HOST:PORT, :PORT, or the path of a Unix socket.
        interval: seconds between two looks.
        sort: the column by which VMs are sorted.
        reverse: the other way round.
        once: print one table and end; rates are those between two looks, one interval apart.
        json: print what the pager says, as JSON, and end.
    """
    if not 0.05 <= interval <= 3600:
        print(f"latepage top: --interval is {interval:g}: give seconds, from 0.05 to 3600", file=sys.stderr)
        return 2
    if not (once or json) and not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("latepage top: this is no terminal: --once prints one table, --json what the pager says", file=sys.stderr)
        return 2
    if json or once:
        asyncio.run(_print(address, interval, sort, reverse=reverse, json=json))
        return 0
    try:
        import textual  # noqa: F401
    except ImportError:
        raise LatepageError("`latepage top` needs textual: pip install 'latepage[top]'; --once does without") from None
    return asyncio.run(_show(address, interval, sort, reverse=reverse))


async def _print(address: str, interval: float, sort: Sort, *, reverse: bool, json: bool) -> None:
    from latepage.observe.top.reader import HttpReader

    async with HttpReader(parse_address(address)) as reader:
        if json:
            print(jsonlib.dumps(await reader.document(), indent=2))
            return
        from rich.console import Console

        from latepage.observe.top.show import Column, once

        before = await reader.all_vms()
        await asyncio.sleep(interval)
        # A pipe has no width, and nothing is to be cut off there.
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(once(before, await reader.all_vms(), Column(sort), reverse=reverse))


async def _show(address: str, interval: float, sort: Sort, *, reverse: bool) -> int:
    from latepage.observe.top.app import TopApp
    from latepage.observe.top.reader import HttpReader
    from latepage.observe.top.show import Column

    asyncio.get_running_loop().set_exception_handler(_complain)
    async with HttpReader(parse_address(address)) as reader:
        # A pager that goes away comes back, perhaps; one that never was there is a mistake.
        await reader.all_vms()
        screen = TopApp(reader, address, interval=interval, column=Column(sort), reverse=reverse)
        await screen.run_async()
    return screen.return_code or 0


def _complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Says what went wrong where nobody waits for it.

    Who quits while an answer is under way may have it arrive when nobody waits for it any more: anyio's Unix sockets then set a
    future that was cancelled. That is nothing to tell.
    """
    if not isinstance(context.get("exception"), asyncio.InvalidStateError):
        loop.default_exception_handler(context)
