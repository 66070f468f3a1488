"""The pictures of `latepage trace`: when each address came and why, how the working set grew, and how two traces differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latepage.memory import format_size
from latepage.observe import trace_format as form
from latepage.observe.picture import FAINT, REASON_NAMES, REASONS, calm, heading, memory_ticks, picture, tiles
from latepage.observe.trace_diff import Difference
from latepage.observe.trace_file import Trace, places
from latepage.observe.trace_summary import Summary

__all__ = ["MOST", "draw_difference", "draw_traces"]

MOST = 8
"""Traces in one picture."""

BOTH, ONLY_A, ONLY_B = REASONS["demand"], REASONS["cleared"], "#4f7cac"
MOST_CELLS = 1 << 20


def draw_traces(traces: Sequence[tuple[Trace, Summary]], path: Path) -> None:
    """Draws traces, one below the other: address against time, coloured by reason, and the working set over time.

    Args:
        traces: up to `MOST` of them, each with its figures.
        path: a file whose suffix is .png or .svg.

    Raises:
        LatepageError: matplotlib is missing, or the file cannot be written.
    """
    if len(traces) == 1:
        trace, summary = traces[0]
        with picture(path, 16, 9) as figure:
            heading(figure, f"What {trace.vm} touched, and when", _about(summary))
            axes = figure.add_axes((0.075, 0.105, 0.445, 0.71))
            _addresses(axes, trace, "Where and when pages came", legend=_came(trace))
            axes.set_xlabel(_time_label(trace))
            _working_set(figure.add_axes((0.61, 0.545, 0.35, 0.27)), trace, summary)
            axes = figure.add_axes((0.61, 0.105, 0.35, 0.3))
            _brought(axes, trace)
            axes.set_xlabel(_time_label(trace))
        return
    row = 3.6
    height = 1.75 + row * len(traces)
    came = set().union(*(_came(trace) for trace, _ in traces))
    with picture(path, 16, height) as figure:
        heading(figure, f"What {len(traces)} VMs touched, and when", "Each on its own scale of time and of memory")
        for number, (trace, summary) in enumerate(traces):
            bottom = (height - 1.75 - row * (number + 1) + 0.85) / height
            axes = figure.add_axes((0.075, bottom, 0.445, 2.4 / height))
            _addresses(axes, trace, trace.vm, legend=set() if number else came)
            axes.set_xlabel(_time_label(trace))
            _working_set(figure.add_axes((0.61, bottom, 0.35, 2.4 / height)), trace, summary)


def _about(summary: Summary) -> str:
    touched = (
        f"{summary.touched:,} of {summary.pages:,} pages touched before they were there ({format_size(summary.touched_bytes)})"
    )
    parts = [format_size(summary.size), touched]
    parts += [f"{summary.lost:,} entries LOST"] if summary.lost else []
    parts += [] if summary.whole else ["recorded up to here: the file is not whole"]
    return f"{summary.file.name}: " + "; ".join(parts)


def _table(trace: Trace) -> Any:
    """The records about pages as columns: where in memory each begins, its bytes, what it is, and when in the picture's unit."""
    import numpy as np

    records = np.frombuffer(trace.records, dtype=[("page", "<u4"), ("what", "<u4"), ("ns", "<u8")])
    kind = records["what"] >> 24
    records, kind = records[kind < form.LOST], kind[kind < form.LOST]
    regions = trace.regions
    units = np.array([region.page_size for region in regions], dtype=np.float64)
    starts = np.concatenate([[0.0], np.cumsum([float(region.size) for region in regions])])
    firsts = np.array(places(regions), dtype=np.int64)
    page = records["page"].astype(np.int64)
    region = np.searchsorted(firsts, page, side="right") - 1
    where = starts[region] + (page - firsts[region]) * units[region]
    size = ((records["what"] & 0xFFFFFF).astype(np.float64) + 1) * units[region]
    return where, size, kind, records["ns"] / 1e9 * _unit(trace)[0]


def _newest(trace: Trace) -> float:
    return max((run.seconds for run in trace.runs()), default=0.0)


def _unit(trace: Trace) -> tuple[float, str]:
    """How many of the picture's units of time a second has, and what they are called."""
    return (1e3, "ms") if _newest(trace) < 2 else (1.0, "seconds")


def _time_label(trace: Trace) -> str:
    return f"{_unit(trace)[1]} after the session began"


def _end(trace: Trace) -> float:
    return (_newest(trace) or 1.0) * _unit(trace)[0]


def _came(trace: Trace) -> set[str]:
    return {run.reason for run in trace.runs()}


def _number(reason: str) -> int:
    return next(number for number, name in form.REASONS.items() if name == reason)


def _memory_axis(axes: Any, size: int) -> None:
    axes.set_yticks(*memory_ticks(size))
    axes.set_ylim(0, size)


def _addresses(axes: Any, trace: Trace, title: str, *, legend: set[str]) -> None:
    """Guest memory from its start at the bottom to its end at the top, against time."""
    import numpy as np
    from matplotlib.colors import ListedColormap

    where, size, kind, when = _table(trace)
    end, rows, columns = _end(trace), 160, 300
    grid = np.full((rows, columns), np.nan)
    column = np.minimum((when / end * columns).astype(np.int64), columns - 1)
    low = np.minimum((where / trace.size * rows).astype(np.int64), rows - 1)
    high = np.clip(np.ceil((where + size) / trace.size * rows).astype(np.int64), low + 1, rows)
    wide = ("population", "beside", "removed")
    for number, reason in enumerate(wide):
        chosen = np.flatnonzero(kind == _number(reason))
        # What is higher than a row is drawn by itself: few records are.
        flat = chosen[high[chosen] - low[chosen] == 1]
        grid[low[flat], column[flat]] = number
        for at in chosen[high[chosen] - low[chosen] > 1]:
            grid[low[at] : high[at], column[at]] = number
    colours = ListedColormap([REASONS[reason] for reason in wide])
    axes.imshow(
        grid, cmap=colours, vmin=-0.5, vmax=2.5, origin="lower", aspect="auto", interpolation="nearest",
        extent=(0, end, 0, trace.size), rasterized=True,
    )  # fmt: skip
    handles = []
    for reason in REASONS:
        chosen = kind == _number(reason)
        style = {"marker": "s", "linestyle": "none", "color": REASONS[reason]}
        if reason in legend:
            handles += axes.plot([], [], label=REASON_NAMES[reason], ms=8, **style)
        if reason in ("demand", "cleared") and chosen.any():
            side = float(np.clip(60 / np.sqrt(chosen.sum()), 1.2, 4))
            axes.plot(when[chosen], where[chosen], ms=side, mew=0, rasterized=True, **style)
    calm(axes, title)
    axes.grid(visible=False)
    axes.set_xlim(0, end)
    _memory_axis(axes, trace.size)
    axes.set_ylabel("guest memory, from its start")
    if handles:
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0.3 if len(title) < 12 else 0.44, 0.995), ncols=2, frameon=False,
            fontsize=10, columnspacing=1.2, handletextpad=0.2,
        )  # fmt: skip


def _working_set(axes: Any, trace: Trace, summary: Summary) -> None:
    unit, _ = _unit(trace)
    moments, grown = _growth(trace, unit)
    label = f"{summary.touched:,} pages, {format_size(summary.touched_bytes)}"
    axes.plot(moments, grown, color=REASONS["demand"], lw=2.5, drawstyle="steps-post", label=label)
    if summary.seconds_to_percent is not None:
        moment = summary.seconds_to_percent * unit
        share = next((size for at, size in zip(moments, grown, strict=True) if at >= moment), grown[-1])
        said = f"{summary.percent:g} % after {_span(summary.seconds_to_percent)}"
        axes.plot(moment, share, "o", color=REASONS["demand"], ms=8, label=said)
    calm(axes, "Working set: memory that the guest touched")
    axes.set_xlim(0, _end(trace))
    _growth_axis(axes, grown[-1])


def _growth_axis(axes: Any, top: int) -> None:
    axes.set_yticks(*(memory_ticks(top) if top else ([0], ["0"])))
    axes.set_ylim(0, (top or 1) * 1.05)
    axes.legend(loc="lower right", frameon=False, fontsize=11)


def _growth(trace: Trace, unit: float) -> tuple[list[float], list[int]]:
    """How many bytes of the working set had been touched by when."""
    moments, grown = [0.0], [0]
    touches = trace.touches()
    for moment, (_, size) in zip(touches.values(), trace.spans(touches), strict=True):
        moments.append(moment * unit)
        grown.append(grown[-1] + size)
    return moments, grown


def _span(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 2 else f"{seconds:.1f} s"


def _brought(axes: Any, trace: Trace) -> None:
    """Bytes that came, by reason, up to each moment. A page that came twice, after a discard, counts twice."""
    import numpy as np

    _, size, kind, when = _table(trace)
    end = _end(trace)
    edges = np.linspace(0, end, 400)
    heights, colours, labels = [], [], []
    for reason in REASONS:
        chosen = kind == _number(reason)
        if not chosen.any():
            continue
        order = np.argsort(when[chosen], kind="stable")
        sums = np.concatenate([[0.0], np.cumsum(size[chosen][order])])
        height = sums[np.searchsorted(when[chosen][order], edges, side="right")]
        label = f"{REASON_NAMES[reason]}: {format_size(int(sums[-1]))}"
        if reason == "removed":
            axes.plot(edges, height, color=REASONS[reason], lw=2, ls="--", label=label)
        else:
            heights.append(height)
            colours.append(REASONS[reason])
            labels.append(label)
    if heights:
        axes.stackplot(edges, heights, colors=colours, labels=labels, lw=0)
    calm(axes, "Memory that came through latepage, and why")
    axes.set_xlim(0, end)
    top = max(trace.size, float(np.sum([height[-1] for height in heights])))
    axes.set_yticks(*memory_ticks(trace.size))
    axes.set_ylim(0, top * 1.03)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", frameon=False, fontsize=11)


def draw_difference(a: Trace, b: Trace, difference: Difference, path: Path) -> None:
    """Draws which pages either VM touched, how both working sets grew, and whether their orders agree.

    Args:
        a: the first trace.
        b: the second one.
        difference: what they have in common.
        path: a file whose suffix is .png or .svg.

    Raises:
        LatepageError: matplotlib is missing, or the file cannot be written.
    """
    names = [trace.vm if a.vm != b.vm else f"{trace.vm} ({trace.path.name})" for trace in (a, b)]
    unit = difference.unit
    overlap = (
        "nothing touched" if difference.jaccard is None else f"overlap {difference.jaccard:.1%} of the {unit} that either touched"
    )
    order = "" if difference.order is None else f"; order correlation {difference.order:.2f}"
    order += "; touches of what population brought do not show" if difference.populated else ""
    with picture(path, 16, 9) as figure:
        heading(figure, f"{names[0]} against {names[1]}", f"{format_size(a.size)} of memory; {overlap} (Jaccard){order}")
        _map(figure, a, difference, names)
        _growths(figure.add_axes((0.53, 0.545, 0.43, 0.27)), (a, b), names)
        _orders(figure.add_axes((0.53, 0.105, 0.43, 0.3)), difference, names)


def _map(figure: Any, trace: Trace, difference: Difference, names: Sequence[str]) -> None:
    import numpy as np
    from matplotlib.colors import ListedColormap

    pages = trace.pages
    # Very large memory: several pages share a cell.
    share = -(-pages // MOST_CELLS)
    cells = np.zeros(-(-pages // share))
    parts = (difference.both, difference.only_b, difference.only_a)
    for number, part in enumerate(parts, 1):
        for stretch in part:
            cells[stretch.start // share : (stretch.stop - 1) // share + 1] = number
    grid = tiles(cells, 0.0)
    axes = figure.add_axes((0.075, 0.155, 0.375, 0.66))
    colours = ListedColormap(["#f3f5f7", BOTH, ONLY_B, ONLY_A])
    axes.imshow(grid, cmap=colours, vmin=-0.5, vmax=3.5, aspect="auto", interpolation="nearest", rasterized=True)
    axes.set_xticks([])
    axes.set_yticks([0, len(grid) / 2, len(grid) - 1], memory_ticks(trace.size)[1])
    calm(axes, f"Which {difference.unit} either VM touched")
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    said = (
        (BOTH, "both", difference.both),
        (ONLY_A, f"only {names[0]}", difference.only_a),
        (ONLY_B, f"only {names[1]}", difference.only_b),
    )
    handles = [
        axes.plot([], [], "s", color=colour, ms=9, label=f"{name}: {len(part):,} {difference.unit}")[0]
        for colour, name, part in said
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.01, -0.01), frameon=False, fontsize=11, handletextpad=0.2)
    axes.set_ylabel("guest memory, row by row, from its start")


def _growths(axes: Any, traces: Sequence[Trace], names: Sequence[str]) -> None:
    unit, called = min((_unit(trace) for trace in traces), key=lambda found: found[0])
    top = 0
    for trace, name, colour in zip(traces, names, (ONLY_A, ONLY_B), strict=True):
        moments, grown = _growth(trace, unit)
        top = max(top, grown[-1])
        axes.plot(moments, grown, color=colour, lw=2.5, drawstyle="steps-post", label=f"{name}: {format_size(grown[-1])}")
    calm(axes, "Pages that were seen to be touched")
    axes.set_xlim(0, None)
    axes.set_xlabel(f"{called} after the session began")
    _growth_axis(axes, top)


def _orders(axes: Any, difference: Difference, names: Sequence[str]) -> None:
    ranks = difference.ranks
    side = max(1.2, min(4.0, 100 / max(1, len(ranks)) ** 0.5))
    axes.plot(range(len(ranks)), ranks, "s", color=BOTH, ms=side, mew=0, rasterized=True)
    end = max(1, len(ranks) - 1)
    axes.plot([0, end], [0, end], color=FAINT, lw=1, zorder=0)
    calm(axes, "Order of what both touched: on the line, the same")
    for set_limits, set_ticks in ((axes.set_xlim, axes.set_xticks), (axes.set_ylim, axes.set_yticks)):
        set_limits(-0.02 * end, 1.02 * end)
        set_ticks([0, end], ["first", "last"])
    axes.set_xlabel(f"place in the order of {names[0]}")
    axes.set_ylabel(f"in that of {names[1]}")
