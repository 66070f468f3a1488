"""How fast background population fills an idle VM, of pages of 4 KiB and of 2 MiB, the memory file in the page cache."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from latepage.bench.bench import Bench
from latepage.bench.figures import Figure, Metric
from latepage.bench.machine import LackingError, huge_pages, need_userfaultfd
from latepage.bench.memory_file import warm
from latepage.bench.processes import Pager, ask, server
from latepage.bench.rounds import Way
from latepage.memory import format_size

__all__ = ["measure"]

RATE = Metric("rate", "GB/s", "more")
ROUNDS = 9
BARE = "C loop of UFFDIO_COPY"

BOUND = 1 / 0.95
"""At least 0.95 of the bare loop's rate, as a ratio of which smaller is better."""

PAGES = {"4 KiB pages": 4096, "2 MiB pages": 2 << 20}


@dataclass(frozen=True, slots=True)
class Fill:
    """One VM, filled by whoever serves it.

    Attributes:
        bench: whose programs and files.
        memory: its memory file.
        page: bytes a page.
    """

    bench: Bench
    memory: Path
    page: int

    def guest(self, socket: Path) -> Mapping[str, float]:
        """An idle guest, until all of its memory is there."""
        size = self.memory.stat().st_size
        said = ask(self.bench.programs["guest"], "copy", socket, str(size), "idle", f"page={self.page}")
        return {RATE.name: size / said["ns"]}

    def bare(self, chunk: int) -> Mapping[str, float]:
        """By the bare loop."""
        warm(self.memory)
        socket = self.bench.folder / "limit.sock"
        size = str(self.memory.stat().st_size)
        with server(self.bench.programs["copier"], socket, self.memory, size, f"chunk={chunk}", socket=socket):
            return self.guest(socket)

    def ours(self, pager: Pager) -> Mapping[str, float]:
        """By us."""
        warm(self.memory)
        rate = self.guest(pager.socket)
        pager.event("ended")
        return rate

    def best_chunk(self, tell: Callable[[float, str], None]) -> int:
        """The size of its copies with which the bare loop is fastest: the best of three runs each."""
        size = self.memory.stat().st_size
        chunks = [chunk for chunk in (64 << 10, 256 << 10, 1 << 20, 2 << 20, 8 << 20, 32 << 20) if self.page <= chunk < size]
        rates: dict[int, float] = {}
        for number, chunk in enumerate([*chunks, size]):
            tell(number / (len(chunks) + 1), f"look for the best chunk: {format_size(chunk)}")
            rates[chunk] = max(self.bare(chunk)[RATE.name] for _ in range(self.bench.sized(3, 1)))
        return max(rates, key=lambda chunk: rates[chunk])


def measure(bench: Bench) -> list[Figure]:
    """Runs it."""
    need_userfaultfd()
    memory = bench.memory_file(bench.sized(256 << 20, 4 << 20))
    figures: list[Figure] = []
    for number, (name, page) in enumerate(PAGES.items()):
        try:
            figures += _of_pages(bench, name, Fill(bench, memory, page), number / len(PAGES))
        except LackingError as why:
            bench.leave_out(f"populate, {name}", why)
    return figures


def _of_pages(bench: Bench, name: str, fill: Fill, begin: float) -> list[Figure]:
    pool = huge_pages(fill.memory.stat().st_size // fill.page) if fill.page > 4096 else nullcontext()
    middle, end = begin + 0.3 / len(PAGES), begin + 1 / len(PAGES)
    with ExitStack() as stack:
        stack.enter_context(pool)
        chunk = fill.best_chunk(lambda share, what: bench.tell(begin + share * (middle - begin), f"{name}: {what}"))
        bench.say(f"populate, {name}: the bare loop is fastest by {format_size(chunk)}")
        pager = stack.enter_context(Pager(bench.socket(), fill.memory, "--populate", "background"))
        ways = [Way(BARE, partial(fill.bare, chunk), peer=True), Way(name, partial(fill.ours, pager))]
        rounds = bench.in_turns("populate", ways, ROUNDS, (middle, end))
    return rounds.figures(name, RATE, {BARE: BOUND})
