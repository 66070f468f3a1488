"""`latepage trace`: what VMs touched, from the traces that `serve --record` wrote."""

import json as jsonlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latepage.errors import TraceError
from latepage.memory import format_size
from latepage.observe.trace_diff import Difference, compare
from latepage.observe.trace_file import MergedTrace, Trace, read_any, read_trace
from latepage.observe.trace_merge import merge as merge_traces
from latepage.observe.trace_merge import write_merged
from latepage.observe.trace_summary import Summary, summarize

__all__ = ["app"]

AHEAD = "population brought pages ahead of the guest: what it touched of those does not show, so this is what was seen, not all"

Flag = Annotated[bool, Parameter(negative=(), show_default=False)]

app = cyclopts.App(
    name="trace",
    help="What VMs touched, when and why, from the traces that `latepage serve --record` wrote.",
)


@app.command
def show(
    *files: Path,
    output: Path | None = None,
    percent: float = 90,
    json: Flag = False,
) -> int:
    """Show traces as a table, and as a picture: address against time, coloured by reason, and the working set over time.

    Args:
        files: traces, whole or not; merged ones too.
        output: draw the traces into this file, .png or .svg.
        percent: give the time by which so much of the working set had been touched.
        json: print the figures as JSON instead of a table.
    """
    wrong = _misunderstood(files, output) or (
        None if 0 < percent <= 100 else f"--percent is {percent:g}: give a share above 0 and up to 100"
    )
    if wrong is not None:
        return _not_understood("show", wrong)
    traces, merged, failed = _read(files, percent)
    if json:
        figures = [_figures(summary) for _, summary in traces] + [_merged_figures(found) for found in merged]
        print(jsonlib.dumps(figures, indent=2))
    else:
        if traces:
            _table([summary for _, summary in traces])
        for found in merged:
            _merged_lines(found)
    if output is not None:
        from latepage.observe.trace_picture import MOST, draw_traces

        if len(traces) > MOST:
            return _not_understood("show", f"--output draws {MOST} traces at most, and these are {len(traces)}: name fewer")
        if traces:
            draw_traces(traces, output)
            _drawn(output, json=json)
        else:
            print("latepage: nothing to draw: --output draws traces of VMs", file=sys.stderr)
            failed = True
    return 1 if failed else 0


@app.command
def diff(a: Path, b: Path, /, *, output: Path | None = None, json: Flag = False) -> int:
    """Compare what two VMs with the same memory touched: overlap, what only one touched, and whether the orders agree.

    Where touches bring what lies beside them (fault-around), stretches of memory are compared within which one hides others.

    Args:
        a: the first trace.
        b: the second one.
        output: draw the difference into this file, .png or .svg.
        json: print the figures as JSON instead of a table.
    """
    wrong = _misunderstood((a, b), output)
    if wrong is not None:
        return _not_understood("diff", wrong)
    first, second = read_trace(a), read_trace(b)
    difference = compare(first, second)
    summaries = summarize(first), summarize(second)
    if json:
        figures = {
            "a": _figures(summaries[0]),
            "b": _figures(summaries[1]),
            "both": len(difference.both),
            "only_a": len(difference.only_a),
            "only_b": len(difference.only_b),
            "jaccard": difference.jaccard,
            "order": difference.order,
            "granule": difference.granule,
            "populated": difference.populated,
        }
        print(jsonlib.dumps(figures, indent=2))
    else:
        _difference(summaries, difference)
    if output is not None:
        from latepage.observe.trace_picture import draw_difference

        draw_difference(first, second, difference, output)
        _drawn(output, json=json)
    return 0


@app.command
def merge(*files: Path, output: Path, min_runs: int = 1, json: Flag = False) -> int:
    """Merge traces of one snapshot into one order: pages by their earliest first touch, and how many runs touched each.

    Args:
        files: traces.
        output: the merged trace.
        min_runs: leave out pages that fewer runs were seen to touch.
        json: print the figures as JSON.
    """
    wrong = _misunderstood(files, None, into=output)
    if wrong is None and not 1 <= min_runs <= len(files):
        wrong = f"--min-runs is {min_runs}: there are {len(files)} runs"
    if wrong is not None:
        return _not_understood("merge", wrong)
    merged = merge_traces([read_trace(file) for file in files], min_runs=min_runs)
    write_merged(output, merged)
    if json:
        print(jsonlib.dumps({"output": str(output), **_merged_figures(merged)}, indent=2))
    else:
        _merged_lines(merged, output)
    return 0


def _read(files: tuple[Path, ...], percent: float) -> tuple[list[tuple[Trace, Summary]], list[MergedTrace], bool]:
    """What can be read, and whether something cannot, which is said: the others are shown all the same."""
    traces: list[tuple[Trace, Summary]] = []
    merged: list[MergedTrace] = []
    failed = False
    for file in files:
        try:
            found = read_any(file)
        except TraceError as error:
            print(f"latepage: {error}", file=sys.stderr)
            failed = True
            continue
        if isinstance(found, MergedTrace):
            merged.append(found)
        else:
            traces.append((found, summarize(found, percent=percent)))
    return traces, merged, failed


def _misunderstood(files: tuple[Path, ...], picture: Path | None, into: Path | None = None) -> str | None:
    """What is wrong with the names, if anything is."""
    if not files:
        return "no file is named: give one that `latepage serve --record` wrote"
    if picture is not None and picture.suffix not in (".png", ".svg"):
        return f"--output {picture}: pictures are .png or .svg; name one"
    output = picture or into
    if output is None:
        return None
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder; name a file in it" if output.is_dir() else f"there is no folder {output.parent}; make it first"
        return f"--output {output}: {what}"
    if any(file.exists() and output.exists() and file.samefile(output) for file in files):
        return f"--output {output}: that is one of the traces; name another file"
    return None


def _not_understood(command: str, wrong: str) -> int:
    print(f"latepage trace {command}: {wrong}", file=sys.stderr)
    return 2


def _drawn(output: Path, *, json: bool) -> None:
    print(f"drawn: {output}", file=sys.stderr if json else sys.stdout)


def _figures(summary: Summary) -> dict[str, Any]:
    fields = {name: getattr(summary, name) for name in Summary.__dataclass_fields__}
    return {"kind": "trace"} | fields | {"file": str(summary.file)}


def _merged_figures(merged: MergedTrace) -> dict[str, Any]:
    return {
        "kind": "merged",
        "file": None if merged.path is None else str(merged.path),
        "runs": [{"vm": vm, "started": started} for vm, started in merged.merged],
        "pages": sum(region.pages for region in merged.regions),
        "touched": len(merged.pages),
        "touched_by": {str(runs): _count(merged, runs) for runs in range(1, len(merged.merged) + 1)},
        "ranges": len(merged.ranges()),
        "granule": merged.granule or None,
        "populated": merged.populated,
    }


def _count(merged: MergedTrace, runs: int) -> int:
    return merged.touched_by.count(runs)


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _table(summaries: list[Summary]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("VM", overflow="fold", min_width=10)
    share = f"{summaries[0].percent:g} %\ntouched"
    for name in ("pages", "touched", "beside", "popu-\nlated", "dis-\ncarded", share, "recorded", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for summary in summaries:
        counts = (summary.pages, summary.touched, summary.beside, summary.populated, summary.removed)
        table.add_row(
            escape(summary.vm),
            *(f"{count:,}" for count in counts),
            _span(summary.seconds_to_percent),
            _span(summary.seconds),
            f"{summary.lost:,}",
            style="" if summary.whole and not summary.lost else "yellow",
        )
    console = Console()
    console.print(table)
    if any(summary.beside or summary.populated for summary in summaries):
        unseen = "touched: not there when the guest touched them; what came beside or ahead of touches may have been used unseen"
        console.print(unseen, style="dim", highlight=False)
    _print_notes(console, summaries)


def _print_notes(console: Console, summaries: Sequence[Summary]) -> None:
    for summary in summaries:
        for note in _notes(summary):
            console.print(f"{summary.file}: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _notes(summary: Summary) -> list[str]:
    notes = []
    if not summary.whole:
        why = "the pager was killed, its disk was full, or it still records"
        notes.append(f"not whole: it has no end mark ({why}); read up to byte {summary.readable:,}")
    if summary.lost:
        notes.append(f"{summary.lost:,} entries came faster than they could be recorded: what is shown lacks them")
    return notes


def _difference(summaries: tuple[Summary, Summary], difference: Difference) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for summary in summaries:
        table.add_column(escape(f"{summary.vm}\n{summary.file.name}"), justify="right", overflow="fold")
    a, b = summaries
    both, unit = f"{len(difference.both):,}", difference.unit
    rows = [
        ("pages seen touched", f"{a.touched:,}", f"{b.touched:,}"),
        (f"{unit}: by both", both, both),
        (f"{unit}: by this one only", f"{len(difference.only_a):,}", f"{len(difference.only_b):,}"),
        (f"{a.percent:g} % touched", _span(a.seconds_to_percent), _span(b.seconds_to_percent)),
        ("lost", f"{a.lost:,}", f"{b.lost:,}"),
    ]
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    if difference.jaccard is None:
        console.print("neither touched a page that was not there", highlight=False)
    else:
        console.print(f"overlap (Jaccard): {difference.jaccard:.1%} of the {unit} that either touched", highlight=False)
    if difference.order is not None:
        console.print(
            f"order (Spearman's correlation): {difference.order:.2f}, where 1 is the same and 0 unrelated", highlight=False
        )
    if difference.granule != difference.page_size:
        size = format_size(difference.granule)
        why = f"compared by {size}: a touch brought up to that along, and later touches of it do not show"
        console.print(why, style="dim", highlight=False)
    if difference.populated:
        console.print(AHEAD, style="yellow", highlight=False)
    _print_notes(console, summaries)


def _merged_lines(merged: MergedTrace, output: Path | None = None) -> None:
    names = ", ".join(dict.fromkeys(vm for vm, _ in merged.merged))
    size, runs = format_size(sum(size for _, size in merged.ranges())), len(merged.merged)
    lines = [f"{output or merged.path}: {len(merged.pages):,} pages ({size}) that {runs} runs were seen to touch: {names}"]
    lines += [
        f"  {_count(merged, runs):,} by {runs} of them" for runs in range(len(merged.merged), 0, -1) if _count(merged, runs)
    ]
    notes = []
    if merged.granule > max((region.page_size for region in merged.regions), default=0):
        size = format_size(merged.granule)
        notes.append(
            f"a touch brought up to {size} along (--fault-around), and later touches of that do not show: more runs may have"
        )
    if merged.populated:
        notes.append(AHEAD)
    console = Console()
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"  {note}", style="dim", highlight=False, soft_wrap=True)
