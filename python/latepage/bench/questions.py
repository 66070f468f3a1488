"""The questions that can be asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latepage.bench.bench import Bench
    from latepage.bench.figures import Figure

__all__ = ["QUESTIONS", "Question"]


@dataclass(frozen=True, slots=True)
class Question:
    """A bench.

    Attributes:
        name: its name on the command line, and its module here.
        asks: what it measures, in a line.
    """

    name: str
    asks: str

    def measure(self, bench: "Bench") -> "list[Figure]":
        """Runs it, and gives its figures.

        Raises:
            LatepageError: something failed.
            LackingError: the machine lacks what all of it takes.
        """
        figures: list[Figure] = import_module(f"latepage.bench.{self.name}").measure(bench)
        return figures


# A question is one file beside this one, with its ways and its bounds, and one line here.
QUESTIONS: Mapping[str, Question] = {
    question.name: question
    for question in (
        Question("faults", "how long a guest's thread waits for one page of 4 KiB, by install and by placement"),
        Question("populate", "how fast background population fills an idle VM"),
        Question("restore", "how soon a restored guest has touched a tenth of its memory, or all of it"),
        Question("scale", "pages a second, CPU a fault and waits, with up to a thousand threads that fault, by delivery"),
        Question(
            "model", "pages a second that a model foretells for many vCPUs and cores, beside what is known; the ratio is its miss"
        ),
        Question("sessions", "what up to a thousand VMs in one pager cost: CPU a fault, memory, CPU while idle"),
        Question("fairness", "what a quiet VM's faults wait beside a neighbour that faults as fast as it can"),
        Question("handshake", "how soon a VM that connects has its first page, alone and among a thousand"),
    )
}
