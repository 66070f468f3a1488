"""Figures as a table for people."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from latepage.bench.figures import Figure

__all__ = ["ratio_of", "show", "size_of"]


def size_of(value: float, unit: str) -> str:
    """A value with three digits that matter.

    >>> size_of(41.27, "µs"), size_of(0.9531, "GB/s"), size_of(1234.5, "µs"), size_of(7.0, "")
    ('41.3 µs', '0.953 GB/s', '1,234 µs', '7.00')
    """
    digits = max(0, 2 - len(f"{abs(value):.0f}") + (abs(value) >= 1)) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}".strip()


def ratio_of(value: float) -> str:
    """A ratio with two digits that matter, or two after the point.

    >>> ratio_of(1.2345), ratio_of(0.0012345)
    ('1.23', '0.0012')
    """
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def show(question: str, asks: str, figures: Sequence[Figure], console: Console) -> None:
    """Prints one question's figures; what is not as it must be stands out."""
    table = Table(title=f"{question}: {asks}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (
        ("way", "left"), ("", "left"), ("value", "right"), ("± spread", "right"), ("beside", "left"), ("has", "right"),
        ("ratio", "right"), ("at most", "right"), ("A/A", "right"), ("", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    before = None
    for figure in figures:
        mark = {True: "holds", False: "over", None: ""}[figure.holds]
        table.add_row(
            figure.way if (figure.way, figure.metric) != before else "",
            figure.metric if (figure.way, figure.metric) != before else "",
            size_of(figure.value, figure.unit),
            f"{100 * figure.spread:.0f} %",
            figure.peer,
            size_of(figure.limit, figure.unit),
            ratio_of(figure.ratio),
            "" if figure.bound is None else f"{figure.bound:.2f}",
            f"{figure.error:.2f}",
            mark,
            style="bold yellow" if figure.holds is False else "bold" if figure.holds else "",
        )
        before = (figure.way, figure.metric)
    console.print(table)
