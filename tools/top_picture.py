"""Draws the pictures of docs/top.md: `latepage top` on a real pager with real reference VMs, as SVG.

    .venv/bin/python tools/top_picture.py docs/images

It takes half a minute: a snapshot is made, VMs are restored from it, and their guests verify, touch and dirty their memory
while it arrives.
"""

import asyncio
import contextlib
import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from textual.pilot import Pilot

from latepage import Pager, Policy, open_source
from latepage.kvm import Job, VmProcess
from latepage.observe.address import parse_address
from latepage.observe.status_server import StatusServer
from latepage.observe.top.app import TopApp, VmTable
from latepage.observe.top.reader import HttpReader

SIZE = (124, 27)
"""Columns and rows of the terminal in the pictures."""

VMS = 16


def snapshot(memory: int) -> tuple[str, str]:
    """A VM that was filled and saved."""
    files = "guest.state", "guest.mem"
    with VmProcess.create(Job("fill", seed=7), memory=memory, save=files) as vm:
        vm.event("saved")
        vm.wait()
    return files


async def draw(pager_at: str, output: Path) -> None:
    """Looks for some seconds, then keeps what is seen: all VMs, and one of them looked into."""

    async def pilot(pilot: Pilot[object]) -> None:
        while not worth_a_picture(pilot):
            await asyncio.sleep(0.1)
        keep(pilot, output / "top.svg")
        # To the third row: the VM that has discarded memory.
        await pilot.press("home", "down", "down", "enter")
        await asyncio.sleep(2.5)
        keep(pilot, output / "top-vm.svg")
        pilot.app.exit()

    async with HttpReader(parse_address(pager_at)) as reader:
        await TopApp(reader, pager_at).run_async(headless=True, size=SIZE, auto_pilot=pilot)


def worth_a_picture(pilot: Pilot[object]) -> bool:
    """Whether there are rates, and some memory has come."""
    table = pilot.app.query_one(VmTable)
    rows = [[cell.plain for cell in table.get_row(name)] for name in table.rows]
    return (
        len(rows) == VMS
        and all(row[2] for row in rows)
        and all(row[1][-4:] > " 29%" for row in rows if row[0].startswith("web-"))
    )


def keep(pilot: Pilot[object], file: Path) -> None:
    """Writes the screen to a file, without the fonts that it would have a browser fetch."""
    drawn = pilot.app.export_screenshot(title="latepage top")
    file.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))


def main(output: Path) -> None:
    """Makes a snapshot, serves VMs from it, and draws."""
    output = output.resolve()
    with tempfile.TemporaryDirectory(prefix="latepage-top-") as name, contextlib.chdir(name), ExitStack() as stack:
        state, memory = snapshot(256 << 20)
        pager = stack.enter_context(Pager())
        stack.enter_context(StatusServer(pager, "status.sock"))
        pager.listen("touched.sock", open_source(memory), Policy(fault_around=4096))
        pager.listen("ahead.sock", open_source(memory), Policy(populate="background"))

        def restore(socket: str, vm: str, *jobs: Job) -> VmProcess:
            return stack.enter_context(VmProcess.restore(state, *jobs, pager=socket, name=vm, api_sock=f"{vm}.api"))

        cache = restore("touched.sock", "cache-1", Job("dirty", seed=9, order="random", pages=((600, 15000), (40000, 9000))))
        cache.done()
        with cache.client() as client:
            client.discard(first=9000, count=4000)
        full = [restore("ahead.sock", f"api-{number}", Job("count")) for number in (1, 2)]
        for vm in full:
            vm.event("first_instruction")
        for number in (1, 2):
            pager.session(f"api-{number}").wait_populated()
        slow = [
            restore("touched.sock", "db-1", Job("verify", seed=5, order="random")),
            restore("touched.sock", "db-2", Job("verify", order="sequential")),
            restore("touched.sock", "db-3", Job("touch", order="strided")),
        ]
        ahead = [restore("ahead.sock", f"web-{number}", Job("verify", seed=number, order="random")) for number in range(1, 11)]
        for vm in [*slow, *ahead[:3]]:
            vm.event("started")
        asyncio.run(draw("status.sock", output))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
