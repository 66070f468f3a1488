"""A question's figures as a picture: each ratio on one line, with what bounds it. It needs matplotlib (extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latepage.bench.figures import Figure
from latepage.bench.table import ratio_of, size_of
from latepage.observe.picture import FAINT, INK, MUTED, heading, picture

__all__ = ["draw"]

LEAST = 0.001
"""Where ratios below it are drawn."""

HOLDS, OVER, PLAIN = "#0f7a6c", "#c2571a", "#8a97a3"


def draw(question: str, asks: str, figures: Sequence[Figure], path: Path) -> None:
    """Draws a question's figures.

    Args:
        question: its name.
        asks: what it measures, in a line.
        figures: one or more.
        path: where the picture goes; .svg or .png.

    Raises:
        LatepageError: matplotlib is missing, or the file cannot be written.
    """
    lines = len(figures)
    height = 2.3 + 0.3 * lines
    with picture(path, 16, height) as figure:
        heading(figure, question, f"{asks}; left of 1 we are better than the peer")
        axes = figure.add_axes((0.47, 0.75 / height, 0.4, 0.3 * lines / height))
        _frame(axes, figures)
        before = None
        for line, each in enumerate(figures):
            _line(axes, lines - 1 - line, each, named=(each.way, each.metric) != before)
            before = (each.way, each.metric)
        axes.set_xlabel(
            "ratio to the peer; | what it may come to, and the band beyond that by which the peer differs from itself (A/A)"
        )


def _frame(axes: Any, figures: Sequence[Figure]) -> None:
    axes.set_xscale("log")
    ratios = [max(LEAST, figure.ratio) for figure in figures] + [figure.allowed for figure in figures if figure.allowed]
    low, high = min([0.5, *ratios]) / 1.3, max([2.0, *ratios]) * 1.3
    axes.set_xlim(low, high)
    axes.set_ylim(-0.6, len(figures) - 0.4)
    ticks = [
        tick for tick in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT, lw=0.8)
    axes.axvline(1, color=MUTED, lw=1)
    axes.set_axisbelow(True)


def _line(axes: Any, y: int, figure: Figure, *, named: bool) -> None:
    colour = {True: HOLDS, False: OVER, None: PLAIN}[figure.holds]
    ratio = max(LEAST, figure.ratio)
    axes.plot([1, ratio], [y, y], color=colour, lw=2, alpha=0.35, solid_capstyle="butt")
    axes.plot(ratio, y, "o", color=colour, ms=7)
    if figure.bound is not None and figure.allowed is not None:
        axes.plot([figure.bound, figure.allowed], [y, y], color=INK, lw=9, alpha=0.15, solid_capstyle="butt")
        axes.plot([figure.bound] * 2, [y - 0.3, y + 0.3], color=INK, lw=1.5)
    beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 10.5}
    if named:
        axes.text(-1.08, y, figure.way, color=INK, **beside)
        axes.text(-0.62, y, f"{figure.metric}: {size_of(figure.value, figure.unit)}", color=INK, **beside)
    axes.text(-0.36, y, f"{figure.peer}: {size_of(figure.limit, figure.unit)}", color=MUTED, **beside)
    bound = "" if figure.bound is None else f" {'>' if figure.holds is False else '≤'} {figure.bound:.2f} · {figure.error:.2f}"
    axes.text(1.02, y, f"{ratio_of(figure.ratio)}{bound}", color=colour, **beside)
