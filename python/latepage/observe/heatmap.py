"""The picture of a restore: every page of the guest, coloured by when it came, and how fast the guest got on.

It needs matplotlib, which the extra `plot` brings.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latepage.memory import PAGE, format_size
from latepage.observe.picture import REASON_NAMES, REASONS, calm, heading, picture, tiles
from latepage.observe.trace_file import Trace

__all__ = ["Curve", "draw"]

Curve = Sequence[tuple[float, float]]
"""Seconds since the restore began, and the share of memory that was verified by then."""

WAYS = ("#8a97a3", "#d8973c", "#0f7a6c")
"""One colour a way of restoring, ours last."""


def draw(trace: Trace, curves: Mapping[str, Curve], path: Path, *, title: str, subtitle: str, shift: float = 0.0) -> None:
    """Draws the picture as a PNG, 1600 by 900 pixels.

    Args:
        trace: of the VM that a pager served.
        curves: for each way of restoring, how the guest's verification got on; the pager's way last.
        path: where the picture goes.
        title: its headline.
        subtitle: a line below it.
        shift: seconds from the moment when the restore began to the start of the trace.

    Raises:
        LatepageError: matplotlib is missing, or the file cannot be written.
    """
    with picture(path, 16, 9) as figure:
        heading(figure, title, subtitle)
        _map(figure, trace, shift)
        _curves(figure, curves)
        _reasons(figure, trace, shift)


def _map(figure: Any, trace: Trace, shift: float) -> None:
    import numpy as np

    came = np.full(trace.pages, np.nan)
    arrivals = list(trace.arrivals())
    pages = np.array([entry.page for entry in arrivals], dtype=np.int64)
    came[pages] = [1e3 * (entry.seconds + shift) for entry in arrivals]
    grid = tiles(came, np.nan)
    rows = len(grid)
    axes = figure.add_axes((0.04, 0.155, 0.39, 0.66))
    image = axes.imshow(grid, cmap="viridis_r", aspect="auto", interpolation="nearest")
    axes.set_facecolor("#f3f5f7")
    axes.set_xticks([])
    axes.set_yticks([0, rows / 2, rows - 1], ["0", *(format_size(trace.pages * PAGE // n) for n in (2, 1))])
    axes.tick_params(length=0, pad=4, labelsize=10)
    for label, place in zip(axes.get_yticklabels(), ("top", "center", "bottom"), strict=True):
        label.set_rotation(90)
        label.set_va(place)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("When each page came", loc="left", fontsize=13, fontweight="bold")
    bar = figure.colorbar(image, cax=figure.add_axes((0.04, 0.105, 0.39, 0.018)), orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, pad=3)
    bar.set_label(f"ms after the restore began; {trace.pages:,} pages in the order of guest memory", labelpad=4)


def _curves(figure: Any, curves: Mapping[str, Curve]) -> None:
    axes = figure.add_axes((0.52, 0.545, 0.44, 0.27))
    end = max(curve[-1][0] for curve in curves.values() if curve)
    for (name, curve), colour in zip(curves.items(), WAYS, strict=False):
        seconds, share = zip(*curve, strict=True)
        ours = colour == WAYS[-1]
        label = f"{name}: runs after {1e3 * seconds[0]:.0f} ms"
        axes.plot(seconds, [100 * s for s in share], color=colour, lw=3 if ours else 2, label=label, zorder=3 if ours else 2)
        axes.plot(seconds[0], 100 * share[0], "o", color=colour, ms=7 if ours else 5, zorder=4)
    axes.set_xlim(0, end * 1.03)
    axes.set_ylim(-2, 103)
    axes.set_yticks([0, 50, 100], ["0", "50", "100 %"])
    calm(axes, "Memory that the guest has verified, in random order")
    axes.set_xlabel("seconds after the restore began")
    axes.legend(loc="lower right", frameon=False, fontsize=11)


def _reasons(figure: Any, trace: Trace, shift: float) -> None:
    import numpy as np

    axes = figure.add_axes((0.52, 0.105, 0.44, 0.3))
    arrivals = list(trace.arrivals())
    end = 1e3 * ((max(entry.seconds for entry in arrivals) if arrivals else 1.0) + shift)
    edges = np.linspace(0, end, 400)
    present = [reason for reason in REASONS if any(entry.reason == reason for entry in arrivals)]
    heights = []
    for reason in present:
        when = np.array([1e3 * (entry.seconds + shift) for entry in arrivals if entry.reason == reason])
        heights.append(100 * np.searchsorted(np.sort(when), edges) / trace.pages)
    axes.stackplot(edges, heights, colors=[REASONS[reason] for reason in present], lw=0)
    handles = [f"{REASON_NAMES[reason]}: {sum(entry.reason == reason for entry in arrivals):,} pages" for reason in present]
    axes.legend(handles, loc="upper left", frameon=False, fontsize=11)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 103)
    axes.set_yticks([0, 50, 100], ["0", "50", "100 %"])
    calm(axes, "Pages that came through latepage, and why")
    axes.set_xlabel("ms after the restore began")
