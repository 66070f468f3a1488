"""`latepage bench`: how fast it is on this machine, beside the machine's limit."""

import json as jsonlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from latepage.bench.bench import Bench
from latepage.bench.figures import Figure
from latepage.bench.machine import LackingError, compiler
from latepage.bench.questions import QUESTIONS, Question
from latepage.bench.table import show
from latepage.errors import LatepageError

__all__ = ["app"]

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

UNLIMITED = 10_000
"""Columns of what is no terminal."""

app = App(
    name="bench",
    help_epilogue="Every figure is a ratio to a peer or to the machine's limit (minimal C programs, compiled for the run), taken "
    "in turns; each peer is run twice a round, and what the two differ by (A/A) widens every bound. Ends with 0 when it ran, "
    "whatever the figures say.",
)


@app.default
def bench(
    question: str | None = None,
    /,
    *,
    json: Path | None = None,
    rounds: int | None = None,
    output: Path | None = None,
    quick: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """Measure how fast latepage is on this machine, beside its limit.

    Args:
        question: which bench, or `all`; the list of them if not given.
        json: write the figures into this file, as a list of objects.
        rounds: how many rounds, instead of what each bench takes by itself.
        output: a folder for a picture of each bench.
        quick: tiny sizes and one round: shows that a bench runs here, and says nothing about speed.
    """
    if question is None:
        _list()
        return 0
    wrong = _misunderstood(question, json, rounds, output)
    if wrong is not None:
        print(f"latepage bench: {wrong}", file=sys.stderr)
        return 2
    asked = list(QUESTIONS.values()) if question == "all" else [QUESTIONS[question]]
    began = time.monotonic()
    try:
        compiler()
    except LackingError as why:
        print(f"latepage bench: every bench compares with C programs that are compiled here, and {why}", file=sys.stderr)
        return 1
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    failed = False
    with _ending_in_order():
        for each in asked:
            found = _ask(each, rounds, output, quick=quick)
            failed = failed or found is None
            figures += found or []
            if json is not None:
                json.write_text(jsonlib.dumps([figure.to_json() for figure in figures], indent=2) + "\n")
    print(f"latepage bench: {time.monotonic() - began:.0f} s", file=sys.stderr)
    if not figures:
        print("latepage bench: nothing could be measured", file=sys.stderr)
    return 1 if failed or not figures else 0


def _ask(question: Question, rounds: int | None, output: Path | None, *, quick: bool) -> list[Figure] | None:
    """Measures, shows and draws one question; None if it failed, which is said."""
    console = Console(stderr=True)
    shown = Progress(
        TextColumn("{task.description:<60}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="latepage-bench-") as folder, shown:
        task = shown.add_task(question.name, total=1.0)

        def tell(share: float, what: str) -> None:
            shown.update(task, completed=share, description=escape(f"{question.name}: {what}"))

        def say(line: str) -> None:
            console.print(f"latepage bench: {line}", highlight=False, markup=False, soft_wrap=True)

        bench = Bench(Path(folder), rounds=rounds, quick=quick, tell=tell, say=say)
        try:
            figures = question.measure(bench)
        except LackingError as why:
            say(f"left out: {question.name}: {why}")
            return []
        except LatepageError as error:
            say(f"{question.name}: {error}")
            return None
    # In a file or a pipe a line is as long as it is: what does not fit would be lost.
    printed = Console(width=None if sys.stdout.isatty() else UNLIMITED)
    show(question.name, question.asks, figures, printed)
    for each in bench.more:
        printed.print(each)
    if output is not None and figures:
        _draw(question, figures, output / f"{question.name}.svg", bench.picture, console)
    return figures


def _draw(question: Question, figures: list[Figure], path: Path, own: Callable[[Path], None] | None, console: Console) -> None:
    from latepage.bench.drawing import draw

    try:
        if own is None:
            draw(question.name, question.asks, figures, path)
        else:
            own(path)
    except LatepageError as error:
        console.print(f"no picture: {error}", style="yellow", markup=False)
    else:
        print(f"drawn: {path}", file=sys.stderr)


def _list() -> None:
    width = max(len(name) for name in QUESTIONS)
    for question in QUESTIONS.values():
        print(f"{question.name:<{width}}  {question.asks}")
    print(f"{'all':<{width}}  all of these")


def _misunderstood(question: str, json: Path | None, rounds: int | None, output: Path | None) -> str | None:
    """What is wrong with the flags, if anything is."""
    if question != "all" and question not in QUESTIONS:
        return f"there is no bench {question!r}: choose one of {', '.join(QUESTIONS)}, or all"
    if rounds is not None and not 1 <= rounds <= 1000:
        return f"--rounds is {rounds}: give a number from 1 to 1000"
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        return f"--json {json}: name a file in a folder that is there"
    if json is not None:
        # Tried before minutes of measuring, not after.
        try:
            json.open("a").close()
        except OSError as error:
            return f"--json {json}: it cannot be written ({error.strerror}); name a file that can"
    if output is not None and output.exists() and not output.is_dir():
        return f"--output {output}: that is no folder; name a folder, or one to be made"
    return None


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """However it is ended, processes are ended and files removed on the way out."""

    def end(number: int, _frame: FrameType | None) -> None:
        # Once is enough: what is tidied up meanwhile must not be cut short.
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
