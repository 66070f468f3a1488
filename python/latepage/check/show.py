"""The reports of `latepage check` for people: tables, by subject."""

from collections.abc import Iterable, Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from latepage.check.host import HostReport
from latepage.check.items import Item
from latepage.check.proc import Region
from latepage.check.vm import VmReport, feature_names
from latepage.memory import format_size

__all__ = ["show_host", "show_vm"]

SUBJECTS = {
    "kernel": "Kernel",
    "pager": "The pager: what `serve` needs of its own process",
    "userfaultfd": "userfaultfd: what VMMs need",
    "vmm": "The VMM's user",
    "kvm": "KVM",
    "memory": "Memory of guests",
}
FEATURE = "userfaultfd.feature."
SHOWN = 12
"""Regions, holders and threads that have a line of their own; the others are counted."""


def show_host(report: HostReport, console: Console) -> None:
    """Prints what was found on a host."""
    for subject, title in SUBJECTS.items():
        items = [item for item in report.items.values() if item.subject == subject]
        if items:
            whose = f": {report.vmm_user.name}" if subject == "vmm" and report.vmm_user else ""
            console.print(_table(title + whose, _rows(items)))
            console.print()
    console.print(_deliveries(report))
    console.print()
    console.print(_legend(report.items.values()))
    console.print(_verdict(report))


def _table(title: str, rows: Iterable[tuple[RenderableType, ...]]) -> Table:
    table = Table(box=None, title=title, title_justify="left", title_style="bold", show_header=False, pad_edge=False)
    table.add_column(width=1)
    table.add_column(width=27)
    table.add_column(ratio=1)
    for row in rows:
        table.add_row(*row)
    return table


def _rows(items: Iterable[Item]) -> Iterator[tuple[RenderableType, ...]]:
    features: list[Item] = []
    untried: dict[str, list[Item]] = {}
    for item in items:
        if item.key.startswith(FEATURE) and item.state == "yes":
            features.append(item)
        elif item.state == "unknown" and item.todo is None:
            untried.setdefault(item.found, []).append(item)
        else:
            yield _mark(item), Text(item.name), _found(item)
    if features:
        yield _mark(features[0]), Text(f"{len(features)} features"), Text(", ".join(item.name for item in features))
    for why, group in untried.items():
        if len(group) == 1:
            yield _mark(group[0]), Text(group[0].name), Text(why)
        else:
            yield _mark(group[0]), Text(f"{len(group)} more"), Text(f"{why} ({', '.join(item.name for item in group)})")


MARKS = {
    # mark: (its style, what it means)
    "✓": ("green", "there"),
    "✗": ("bold red", "`serve` needs it"),
    "!": ("yellow", "a part of latepage needs it"),
    "·": ("dim", "nothing needs it yet"),
    "?": ("yellow", "not tried"),
}


def _mark(item: Item) -> Text:
    mark = {"yes": "✓", "unknown": "?"}.get(item.state) or {"serve": "✗", "feature": "!"}.get(item.need, "·")
    return Text(mark, MARKS[mark][0])


def _legend(items: Iterable[Item]) -> Text:
    shown = {_mark(item).plain for item in items}
    return Text("   ".join(f"{mark} {means}" for mark, (_, means) in MARKS.items() if mark in shown), "dim")


def _found(item: Item) -> RenderableType:
    found = Text(item.found, "bold red" if item.stops_serve else "")
    return found if item.todo is None else Group(found, Text(f"→ {item.todo}", "cyan"))


def _deliveries(report: HostReport) -> Table:
    table = Table(box=None, title="Deliveries", title_justify="left", title_style="bold", pad_edge=False, header_style="dim")
    for heading in ("", "in latepage", "this host"):
        table.add_column(heading)
    table.add_column("", ratio=1)
    styles = {"yes": ("has all of it", "green"), "no": ("lacks", "yellow"), "unknown": ("not all tried", "yellow")}
    for delivery in report.deliveries:
        words, style = styles[delivery.kernel]
        says: list[RenderableType] = [Text(delivery.says)]
        if delivery.lacks:
            says.append(Text(f"→ see {', '.join(report.items[key].name for key in delivery.lacks)}", "cyan"))
        table.add_row(
            delivery.name,
            Text("there", "green") if delivery.in_latepage else Text("to come", "dim"),
            Text(words, style),
            Group(*says),
        )
    return table


def _verdict(report: HostReport) -> Text:
    if report.can_serve:
        whom = f"VMs of {report.vmm_user.name}" if report.vmm_user else "VMs"
        return Text(f"`latepage serve` can serve {whom} here.", "bold green")
    lacking = ", ".join(item.name for item in report.lacking)
    if report.vmm_user and all(item.subject == "vmm" for item in report.lacking):
        return Text(f"`latepage serve` cannot serve VMs of {report.vmm_user.name} here: it lacks {lacking}.", "bold red")
    return Text(f"`latepage serve` cannot work here: it lacks {lacking}.", "bold red")


def show_vm(report: VmReport, console: Console) -> None:
    """Prints what was seen of a VM."""
    process = report.process
    title = Text.assemble((f"Process {process.pid}", "bold"), "  ", " ".join(process.words))
    console.print(title, no_wrap=True, overflow="ellipsis")
    console.print()
    console.print(Text(report.says, "bold green" if report.is_well else "bold red"))
    if report.todo is not None:
        console.print(Text(f"→ {report.todo}", "cyan"))
    console.print()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(ratio=1)
    for name, said in _seen(report):
        table.add_row(name, said)
    console.print(table)


def _seen(report: VmReport) -> Iterator[tuple[str, str]]:
    """What was seen, line by line."""
    for descriptor in report.userfaultfds:
        features = ", ".join(feature_names(descriptor.features)) or "plain faults"
        waits = {0: "no fault waits", 1: "1 fault waits"}.get(descriptor.waiting, f"{descriptor.waiting} faults wait")
        unread = f", {descriptor.pending} unread" if descriptor.pending else ""
        yield "userfaultfd", f"descriptor {descriptor.number}: {waits}{unread}; made for {features}"
        for holder in [holder for holder in report.holders if holder.of == descriptor.number][:SHOWN]:
            state = " (stopped)" if holder.process.state in ("T", "t") else ""
            who = f"process {holder.process.pid}, user {holder.process.uid}{state}"
            yield "  held by", f"{who}: {' '.join(holder.process.words)}"
    if not report.userfaultfds:
        yield "userfaultfd", "none of its own"
    yield from _some("region", [_region(region) for region in report.regions])
    if report.waiting is not None:
        threads = [
            f"{thread.name} ({thread.tid}) waits for {'a page' if thread.waits_for == 'page' else 'an event to be read'}"
            + (f", and has not run for {report.looked:.1f} s" if thread.tid in {other.tid for other in report.stuck} else "")
            for thread in report.waiting
        ]
        yield from _some("thread", threads)
    for line in report.unseen:
        yield "not seen", line


def _region(region: Region) -> str:
    what = f" of {region.path}" if region.path else ""
    pages = "" if region.page_size == 4096 else f", pages of {format_size(region.page_size)}"
    modes = "+".join(region.modes)
    return f"{region.start:#x}: {format_size(region.size)}{what}, {format_size(region.present)} there{pages}; {modes}"


def _some(name: str, lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines[:SHOWN]:
        yield name, line
    if len(lines) > SHOWN:
        yield "", f"and {len(lines) - SHOWN} more"
