"""What all pictures have in common: their colours, their frame, and how they become files. It needs matplotlib (extra `plot`)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latepage.errors import LatepageError
from latepage.memory import format_size
from latepage.observe.trace_merge import replacing

__all__ = ["FAINT", "INK", "MUTED", "PAPER", "REASONS", "REASON_NAMES", "calm", "heading", "memory_ticks", "picture", "tiles"]

INK, MUTED, FAINT, PAPER = "#1b2733", "#64717e", "#dde3e8", "#ffffff"
REASONS = {"demand": "#0f7a6c", "beside": "#6cc0a8", "population": "#cfe3e8", "cleared": "#d8973c", "removed": "#8a97a3"}
REASON_NAMES = {
    "demand": "touched by the guest",
    "beside": "brought in beside it",
    "population": "brought ahead of it",
    "cleared": "zero after a discard",
    "removed": "discarded by the VMM",
}


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches (100 pixels each) that becomes the file `path`, once it is drawn; its suffix says the format.

    Raises:
        LatepageError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise LatepageError("pictures need matplotlib: install latepage with its extra, latepage[plot]") from None

    with mpl.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 11,
            "text.color": INK,
            # Names come from strangers: a dollar sign is no formula.
            "text.parse_math": False,
            "svg.fonttype": "none",
            "axes.labelcolor": MUTED,
            "axes.edgecolor": FAINT,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure = Figure(figsize=(width, height), dpi=100, facecolor=PAPER)
        yield figure
        metadata = {"Creator": "latepage", "Date": None} if path.suffix == ".svg" else {"Software": "latepage"}
        with replacing(path) as part, warnings.catch_warnings():
            # A name may have characters that the font lacks: it shows boxes in their place, and that is all.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(part, metadata=metadata)


def heading(figure: Any, title: str, subtitle: str) -> None:
    """The title, and a line below it, at the same distance from the edges in figures of every height."""
    height = figure.get_figheight()
    left = 0.56 / figure.get_figwidth()
    figure.text(left, 1 - 0.495 / height, title, fontsize=22, fontweight="bold", va="center")
    figure.text(left, 1 - 0.882 / height, subtitle, fontsize=12.5, color=MUTED, va="center")


def calm(axes: Any, title: str) -> None:
    """Axes without ticks' strokes, with faint lines across and a title on the left."""
    axes.grid(axis="y", color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")


def memory_ticks(size: int) -> tuple[list[float], list[str]]:
    """Ticks for an axis of guest memory, in bytes: nothing, half of it, all of it.

    >>> memory_ticks(256 << 20)
    ([0, 134217728.0, 268435456], ['0', '128 MiB', '256 MiB'])
    """
    return [0, size / 2, size], ["0", format_size(size // 2), format_size(size)]


def tiles(values: Any, blank: Any) -> Any:
    """One value a page as a grid of a power of two of columns, so that rows begin at round addresses.

    Sixteen pages, which one fault may bring, make a square of four by four; the squares follow each other in rows.
    """
    import numpy as np

    side = 16
    while side * side < len(values):
        side *= 2
    grid = np.full(side * side, blank)
    grid[: len(values)] = values
    rows = 4 * -(-len(values) // (4 * side))
    return grid.reshape(side // 4, side // 4, 4, 4).transpose(0, 2, 1, 3).reshape(side, side)[:rows]
