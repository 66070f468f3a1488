"""Pages a second against threads or vCPUs: a line for each way. It needs matplotlib (extra `plot`)."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

from latepage.observe.picture import FAINT, INK, MUTED, heading, picture

__all__ = ["Curves", "colour_of", "draw_rates", "plot"]

Curves = Mapping[str, Mapping[int, float]]
"""By way, pages a second in thousands by the number of threads."""

COLOURS = {"uffd": "#c2571a", "sharded": "#d8973c", "exit": "#0f7a6c", "notify": "#3a6ea5"}
"""By what a way's name contains."""


def draw_rates(title: str, subtitle: str, curves: Curves, path: Path) -> None:
    """Draws them into one frame; what is C's is dashed.

    Args:
        title: above the picture.
        subtitle: below the title.
        curves: what was measured.
        path: where the picture goes; .svg or .png.

    Raises:
        LatepageError: matplotlib is missing, or the file cannot be written.
    """
    with picture(path, 12, 7) as figure:
        heading(figure, title, subtitle)
        axes = figure.add_axes((0.08, 0.1, 0.62, 0.7))
        plot(axes, curves, "threads that fault at the same time")
        axes.set_ylabel("thousand pages a second")


def plot(
    axes: Any,
    curves: Curves,
    below: str,
    *,
    named: bool = True,
    dots: bool = True,
    limits: tuple[float, float] | None = None,
) -> None:
    """Puts lines into axes: both scales logarithmic, each line's name at its right end."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    counts = sorted({count for line in curves.values() for count in line})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    values = [value for line in curves.values() for value in line.values() if value > 0]
    low, high = limits or (min(values), max(values))
    ticks = [tick for tick in _ticks() if low / 1.5 <= tick <= high * 1.5]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(low / 1.5, high * 1.5)
    axes.minorticks_off()
    axes.tick_params(length=0)
    axes.grid(color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(below)
    ends: list[End] = []
    for name, line in curves.items():
        across = sorted(line)
        colour, theirs = colour_of(name), name.startswith("C,")
        heights = [line[count] for count in across]
        width, stroke, dot = (1.2, "--", 3) if theirs else (2.2, "-", 5)
        axes.plot(across, heights, color=colour, lw=width, ls=stroke, marker="o" if dots else "", ms=dot)
        ends.append((name, colour, heights[-1]))
    if named:
        for (name, colour, _), place in zip(*_apart(ends, axes.get_ylim()), strict=True):
            axes.text(1.02, place, name, transform=axes.transAxes, color=colour or INK, va="center", fontsize=10.5)


End = tuple[str, str, float]
"""A line's name, its colour, and its last value."""


def _apart(ends: Sequence[End], limits: tuple[float, float]) -> tuple[list[End], list[float]]:
    """The lines' names from the lowest up, and heights (0 to 1) for them, none nearer to the next than a line of text."""
    low, high = limits
    ordered = sorted(ends, key=lambda end: end[2])
    places: list[float] = []
    for _, _, value in ordered:
        wanted = (log(max(value, low)) - log(low)) / (log(high) - log(low))
        places.append(max(wanted, places[-1] + 0.045) if places else wanted)
    return ordered, places


def _ticks() -> list[int]:
    return [digit * 10**power for power in range(6) for digit in (1, 2, 5)]


def colour_of(name: str) -> str:
    """The colour of a way's line."""
    words = {"C, one userfaultfd": "uffd", "C, in the thread": "exit", "C, plain channel": "notify"}.get(name, name)
    kind = "sharded" if "shard" in words else next((kind for kind in COLOURS if kind in words), "")
    return COLOURS.get(kind, MUTED)
