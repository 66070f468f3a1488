"""What the model foretells, as a table and as a picture."""

from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from latepage.bench.curves import Curves, colour_of, plot
from latepage.observe.picture import calm, heading, picture

__all__ = ["draw_forecasts", "forecast_table"]


def forecast_table(told: Mapping[int, Curves]) -> Table:
    """Thousand pages a second, by the cores of the host, by vCPUs, by delivery."""
    deliveries = list(next(iter(told.values())))
    table = Table(title="foretold: k pages/s by delivery", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("cores", "vCPUs", *deliveries):
        table.add_column(name, justify="right", no_wrap=True)
    for host, curves in told.items():
        counts = sorted(curves[deliveries[0]])
        for count in counts:
            rates = (f"{curves[delivery][count]:,.0f}" for delivery in deliveries)
            table.add_row(str(host) if count == counts[0] else "", str(count), *rates)
        table.add_section()
    return table


def draw_forecasts(told: Mapping[int, Curves], here: int, measured: Curves, path: Path) -> None:
    """Draws a panel for each host; in that of this machine, dots for what was measured.

    Args:
        told: by the cores of the host, thousand pages a second by delivery and vCPUs.
        here: cores of this machine.
        measured: the same, as measured here.
        path: where the picture goes; .svg or .png.

    Raises:
        LatepageError: matplotlib is missing, or the file cannot be written.
    """
    width = 5.0
    with picture(path, 2.2 + width * len(told), 6.5) as figure:
        heading(
            figure,
            "model",
            "thousand pages a second by the number of vCPUs, foretold from this machine's costs; dots: measured here",
        )
        rates = [rate for curves in told.values() for line in curves.values() for rate in line.values()]
        across = figure.get_figwidth()
        for number, (host, curves) in enumerate(told.items()):
            left = (0.7 + number * width) / across
            axes = figure.add_axes((left, 0.12, (width - 0.7) / across, 0.62))
            last = number == len(told) - 1
            plot(axes, curves, "vCPUs that fault at the same time", named=last, dots=False, limits=(min(rates), max(rates)))
            calm(axes, f"{host:,} cores" + (" (this machine)" if host == here else ""))
            if host == here:
                for delivery, line in measured.items():
                    axes.plot(list(line), list(line.values()), "o", color=colour_of(delivery), ms=5, alpha=0.8)
