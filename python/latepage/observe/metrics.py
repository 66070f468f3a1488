"""A pager's figures as Prometheus metrics; docs/metrics.md has the table of all of them.

Everything is read from the engine when it is asked for: nothing is kept here, and nothing runs between two scrapes. What only
grows are sums over living and ended VMs, so that no counter goes back when a VM ends.
"""

import os
from collections.abc import Iterable, Iterator

from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from latepage import __version__
from latepage.pager import Pager
from latepage.session import Progress, Session
from latepage.stats import Stats

__all__ = ["COUNTERS", "EVENTS", "PREFIX", "PagerCollector", "registry"]

PREFIX = "latepage"

COUNTERS = {
    "faults": ("faults", "Faults that the kernel delivered, of every kind: what guests asked for."),
    "writes": ("write_faults", "Faults by a write to an absent page."),
    "write_protects": ("write_protect_faults", "Faults by a write to a write-protected page."),
    "minors": ("minor_faults", "Faults on a page whose contents are in the page cache but that the guest does not map yet."),
    "joined": ("joined_faults", "Faults on a page that was being brought already: they only waited."),
    "present": ("present_faults", "Faults on a page that the guest already had."),
    "later": ("deferred_faults", "Faults that the source could not answer at once and that went to an I/O thread."),
    "source_pages": ("demand_pages", "Pages installed with contents from the source because a fault asked for them."),
    "beside_pages": ("fault_around_pages", "Pages brought in beside a faulting one."),
    "beside_touched": (
        "fault_around_touched_pages",
        "Of those, the pages that the guest is known to have touched afterwards.",
    ),
    "populated_pages": ("population_pages", "Pages brought in by population, before anyone asked."),
    "zero_pages": ("zero_pages", "Pages installed as zero, whoever asked for them."),
    "removed_pages": ("removed_pages", "Pages that VMMs discarded."),
    "bytes_installed": ("installed_bytes", "Bytes of guest memory installed, zero pages included."),
    "ring_reads": ("ring_reads", "Reads that were made for them by io_uring."),
    "shared_reads": (
        "shared_reads",
        "Faults for which another VM's read was under way already, which did for them too.",
    ),
    "retries": ("install_retries", "Installs that the kernel asked to try again."),
    "already_there": ("install_present_pages", "Installs that found the page already there."),
    "failures": ("failed_pages", "Pages that could not be had."),
    "stalls": ("stalled_faults", "Faults that grew older than the stall limit."),
    "reads": ("userfaultfd_reads", "Calls of read(2) on userfaultfds."),
}
"""The metric, without prefix and `_total`, of each of the engine's counters, and what it says."""

EVENTS = {
    "session-started": ("vms_started", "VMs that have shaken hands and were served."),
    "ended": ("vms_ended", "VMs whose session is over."),
    "refused": ("vms_refused", "Peers that were not served."),
    "populated": ("vms_populated", "VMs that have got all of their memory."),
    "detached": ("vms_detached", "Full VMs that were let go."),
    "population-stopped": ("population_stops", "Populations that met an error and stopped."),
    "source-changed": ("source_changes", "Times that a memory file was written to while it was served."),
    "lease-breaking": ("lease_breaks", "Times that somebody opened a served memory file for writing."),
    "no-memory": ("no_memory", "Times that the machine had no page for a VM."),
    "surprise": ("surprises", "Things that VMs did and that a pager cannot follow."),
    "warning": ("warnings", "Things that the pager may need and cannot do."),
}
"""The metric, without prefix and `_total`, of each kind of event that is worth a rate, and what it says.

`left` is not among them: a pager counts it in the moment in which it ends, and nobody scrapes it after that."""

VM_COUNTERS = {
    "faults": ("vm_faults", "Faults of this VM that the kernel delivered."),
    "bytes_installed": ("vm_installed_bytes", "Bytes of this VM's memory installed."),
    "populated_pages": ("vm_population_pages", "Pages of this VM brought in by population."),
    "failures": ("vm_failed_pages", "Pages of this VM that could not be had."),
    "stalls": ("vm_stalled_faults", "Faults of this VM that grew older than the stall limit."),
}
"""The same for one VM: the few that say how it is."""

STANCES = ("block", "spin", "core")
"""How a worker may wait."""

WISHES = ("placement", "realtime", "nice", "io_uring")
"""What a pager may be asked for, and not get."""

MEMORY_STATES = ("present", "removed", "failed", "lacking")
"""What has become of memory, as `Progress` counts it."""


def registry(pager: Pager, *, per_vm: bool = False) -> CollectorRegistry:
    """A registry that holds the pager's metrics and its process's, and nothing else.

    Args:
        pager: whose.
        per_vm: one set of metrics for each VM as well, labelled with its name.
    """
    made = CollectorRegistry()
    made.register(PagerCollector(pager, per_vm=per_vm))
    ProcessCollector(namespace=PREFIX, pid=os.getpid, registry=made)
    return made


class PagerCollector(Collector):
    """Reads a pager for each scrape.

    >>> from latepage import Pager
    >>> with Pager() as pager:
    ...     families = {family.name: family for family in PagerCollector(pager).collect()}
    >>> families["latepage_faults"].samples[0].name, families["latepage_faults"].samples[0].value
    ('latepage_faults_total', 0.0)
    """

    def __init__(self, pager: Pager, *, per_vm: bool = False) -> None:
        self._pager = pager
        self._per_vm = per_vm

    def collect(self) -> Iterator[Metric]:
        """All metrics, read now."""
        sessions = [(session, session.progress) for session in self._pager.sessions()]
        stats = self._pager.stats
        yield InfoMetricFamily(f"{PREFIX}_build", "What runs here.", value={"version": __version__})
        yield _gauge("ready", "1 while VMs are taken: the pager listens and is not draining.", self._pager.ready)
        yield from _vms([progress for _, progress in sessions])
        yield _memory("memory_bytes", "Guest memory of the VMs served now, by what has become of it.", sessions, label_vm=False)
        yield _workers(self._pager.workers)
        says = "What reads the pages that faults wait for and that are not in memory."
        yield InfoMetricFamily(f"{PREFIX}_cold_reads", says, value={"engine": self._pager.cold_reads})
        yield _fallbacks([fallback.wish for fallback in self._pager.fallbacks])
        for counter, (name, says) in COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", says, value=float(stats.counters[counter]))
        yield _durations(stats)
        told = self._pager.events_told
        for event, (name, says) in EVENTS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", says, value=float(told[event]))
        if self._per_vm:
            yield from _each_vm(sessions)


def _gauge(name: str, says: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", says, value=float(value))


def _vms(all_progress: list[Progress]) -> Iterator[Metric]:
    full = sum(progress.full for progress in all_progress)
    family = GaugeMetricFamily(f"{PREFIX}_vms", "VMs served now, by whether they have all of their memory.", labels=["memory"])
    family.add_metric(["complete"], full)
    family.add_metric(["incomplete"], len(all_progress) - full)
    yield family


def _workers(stances: list[str]) -> Metric:
    says = "Threads that serve faults, by how they wait now: asleep (block), spinning (spin), asleep on a chosen core (core)."
    family = GaugeMetricFamily(f"{PREFIX}_workers", says, labels=["placement"])
    for stance in STANCES:
        family.add_metric([stance], stances.count(stance))
    return family


def _fallbacks(wishes: list[str]) -> Metric:
    says = "Things that were asked for and cannot be had on this host; the log says why, and what is done instead."
    family = GaugeMetricFamily(f"{PREFIX}_fallbacks", says, labels=["wish"])
    for wish in WISHES:
        family.add_metric([wish], wishes.count(wish))
    return family


def _memory(name: str, says: str, sessions: Iterable[tuple[Session, Progress]], *, label_vm: bool) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", says, labels=["vm", "state"] if label_vm else ["state"])
    total = dict.fromkeys(MEMORY_STATES, 0)
    for session, progress in sessions:
        # All regions of a VM have pages of one size.
        page_size = session.regions[0].page_size
        for state in MEMORY_STATES:
            size = getattr(progress, state) * page_size
            total[state] += size
            if label_vm:
                family.add_metric([session.name, state], size)
    if not label_vm:
        for state, size in total.items():
            family.add_metric([state], size)
    return family


def _durations(stats: Stats) -> Metric:
    family = HistogramMetricFamily(
        f"{PREFIX}_fault_duration_seconds",
        "How long faults waited, from their delivery to the release of who waited, by the page they met and what came of them.",
        labels=["page_class", "result"],
    )
    for (page_class, result), histogram in stats.faults_by.items():
        buckets = [(repr(bound), float(count)) for bound, count in histogram.cumulative]
        family.add_metric([page_class, result], [*buckets, ("+Inf", float(histogram.count))], histogram.sum)
    return family


def _each_vm(sessions: list[tuple[Session, Progress]]) -> Iterator[Metric]:
    read = [(session, session.stats) for session, _ in sessions]
    about = InfoMetricFamily(f"{PREFIX}_vm", "Who this VM is.", labels=["vm"])
    for session, _ in sessions:
        about.add_metric([session.name], {"pid": str(session.pid), "form": session.form, "backing": session.backing})
    yield about
    yield _memory("vm_memory_bytes", "Memory of this VM, by what has become of it.", sessions, label_vm=True)
    for counter, (name, says) in VM_COUNTERS.items():
        family = CounterMetricFamily(f"{PREFIX}_{name}", says, labels=["vm"])
        for session, stats in read:
            family.add_metric([session.name], stats.counters[counter])
        yield family
    # The library's own family for summaries has no quantiles.
    name = f"{PREFIX}_vm_fault_duration_seconds"
    summary = Metric(name, "How long this VM's faults waited.", "summary")
    for session, stats in read:
        latency, vm = stats.latency, {"vm": session.name}
        for quantile, value in (("0.5", latency.p50), ("0.99", latency.p99)):
            summary.add_sample(name, vm | {"quantile": quantile}, value)
        summary.add_sample(f"{name}_count", vm, latency.count)
        summary.add_sample(f"{name}_sum", vm, latency.count * latency.mean)
    yield summary
