"""How fast it is, each figure beside a peer's or the machine's limit from the same run: `latepage bench`.

One module a question; `questions` lists them. What they share: `rounds` takes ways in turns, `figures` makes ratios of what came,
`programs` compiles the minimal C programs of limit/, `processes` runs them and pagers, `bench` is what a question is given.
"""

from latepage.bench.figures import Figure, Metric
from latepage.bench.questions import QUESTIONS, Question

__all__ = ["QUESTIONS", "Figure", "Metric", "Question"]
