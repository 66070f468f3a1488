"""What a question is given: a folder, programs, memory files, how thorough to be, and whom to tell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.console import RenderableType

from latepage.bench.processes import ask
from latepage.bench.programs import Programs
from latepage.bench.rounds import Rounds, Way, in_turns

__all__ = ["Bench"]

T = TypeVar("T")


@dataclass(slots=True)
class Bench:
    """One run of `latepage bench`.

    Attributes:
        folder: for all files; removed afterwards.
        rounds: how many rounds, where the user said so.
        quick: tiny sizes and one round: shows that it runs, and says nothing about speed.
        tell: is told the share of the question that is done, and what is being measured.
        say: is told what a reader of the figures must know.
        left_out: what was left out, and why.
        picture: draws the question in its own manner, given a path; None where figures as lines of ratios say it all.
        more: what is printed below the figures.
        programs: the C programs.
    """

    folder: Path
    rounds: int | None = None
    quick: bool = False
    tell: Callable[[float, str], None] = lambda _share, _what: None
    say: Callable[[str], None] = lambda _line: None
    left_out: list[str] = field(default_factory=list)
    picture: Callable[[Path], None] | None = None
    more: list[RenderableType] = field(default_factory=list)
    programs: Programs = field(init=False)
    _files: dict[int, Path] = field(default_factory=dict)
    _sockets: int = 0

    def __post_init__(self) -> None:
        self.programs = Programs(self.folder)

    def sized(self, full: T, quick: T) -> T:
        """The one or the other, by how thorough to be."""
        return quick if self.quick else full

    def leave_out(self, what: str, why: object) -> None:
        """Notes that the machine does not allow something, and says so."""
        self.left_out.append(f"{what}: {why}")
        self.say(f"left out: {what}: {why}")

    def in_turns(self, question: str, ways: Sequence[Way], rounds: int, part: tuple[float, float] = (0.0, 1.0)) -> Rounds:
        """Measures ways in turns; `part` says from where to where of the question's progress that goes."""
        first, last = part
        count = self.rounds or self.sized(rounds, 1)
        return in_turns(question, ways, count, lambda share, what: self.tell(first + share * (last - first), what))

    def memory_file(self, size: int) -> Path:
        """A memory file of so many bytes, made once; in the page cache, and on the disk."""
        if size not in self._files:
            path = self.folder / f"{size >> 20}MiB.mem"
            self.tell(0.0, "write a memory file")
            ask(self.programs["contents"], path, str(size))
            self._files[size] = path
        return self._files[size]

    def socket(self) -> Path:
        """The path of a socket that nobody has used yet."""
        self._sockets += 1
        return self.folder / f"{self._sockets}.sock"
