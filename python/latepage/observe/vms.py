"""How a pager and its VMs are, as plain JSON: what the status server answers at /vms, and `latepage top` reads.

docs/metrics.md describes the format. Its number, `VERSION`, grows when a key goes or changes its meaning; new keys may come at
any time.
"""

import os
import time
from itertools import pairwise
from typing import Any

from latepage import __version__
from latepage.memory import PageState
from latepage.pager import Pager
from latepage.session import Session
from latepage.stats import Histogram, Latency, Stats

__all__ = ["CELL_STATES", "MOST_CELLS", "VERSION", "all_vms", "one_vm", "quantile"]

VERSION = 1
"""Of the format."""

CELL_STATES = ("present", "removed", "failed", "lacking")
"""What is counted in each cell of a VM's memory, in this order."""

MOST_CELLS = 4096

_COUNTED = {
    "present": (PageState.PRESENT, PageState.FILLED),
    "removed": (PageState.REMOVED,),
    "failed": (PageState.FAILED,),
    "lacking": (PageState.ABSENT, PageState.IN_FLIGHT, PageState.CLEARING),
}


def all_vms(pager: Pager) -> dict[str, Any]:
    """The pager, and all VMs that it serves now."""
    return {
        "version": VERSION,
        "at": time.time(),
        "clock": time.monotonic(),
        "pager": {
            "latepage": __version__,
            "pid": os.getpid(),
            "ready": pager.ready,
            "sockets": [{"socket": path, "source": str(source), "size": source.size} for path, source in pager.sockets.items()],
            "events": pager.events_told,
            **_stats(pager.stats),
        },
        "vms": [_vm(session, session.stats) for session in pager.sessions()],
    }


def one_vm(session: Session, cells: int) -> dict[str, Any]:
    """One VM, with its regions and how its memory stands, divided into at most so many cells."""
    stats = session.stats
    return {
        "version": VERSION,
        "at": time.time(),
        "clock": time.monotonic(),
        "vm": _vm(session, stats)
        | {
            "closed": session.closed,
            "regions": [
                {
                    "gpa": region.gpa,
                    "hva": region.hva,
                    "size": region.size,
                    "offset": region.offset,
                    "page_size": region.page_size,
                }
                for region in session.regions
            ],
            "faults_by": _faults_by(stats),
            "cell_states": list(CELL_STATES),
            "cells": _cells(session.pages(), cells),
        },
    }


def _vm(session: Session, stats: Stats) -> dict[str, Any]:
    progress = session.progress
    regions = session.regions
    return {
        "name": session.name,
        "pid": session.pid,
        "form": session.form,
        "backing": session.backing,
        "vcpus": session.vcpus,
        "age": session.age,
        "size": sum(region.size for region in regions),
        "page_size": regions[0].page_size,
        "pages": {
            "total": progress.total,
            "present": progress.present,
            "removed": progress.removed,
            "failed": progress.failed,
            "lacking": progress.lacking,
        },
        "counters": stats.counters,
        "latency": _latency(stats.latency),
    }


def _stats(stats: Stats) -> dict[str, Any]:
    return {"counters": stats.counters, "latency": _latency(stats.latency), "faults_by": _faults_by(stats)}


def _latency(latency: Latency) -> dict[str, float]:
    return {
        "count": latency.count,
        "mean": latency.mean,
        "p50": latency.p50,
        "p99": latency.p99,
        "max": latency.max,
    }


def _faults_by(stats: Stats) -> list[dict[str, Any]]:
    return [
        {
            "page_class": page_class,
            "result": result,
            "count": histogram.count,
            "sum": histogram.sum,
            "p50": quantile(histogram, 0.5),
            "p99": quantile(histogram, 0.99),
        }
        for (page_class, result), histogram in stats.faults_by.items()
    ]


def quantile(histogram: Histogram, share: float) -> float:
    """How long so many of the faults waited at most, in seconds, as Prometheus' histogram_quantile() reckons it.

    Between two bounds, of which one is twice the other, it takes the waits to be spread evenly.

    >>> quantile(Histogram(cumulative=((1.0, 0), (2.0, 10), (4.0, 10)), count=10, sum=15.0), 0.5)
    1.5
    >>> quantile(Histogram(cumulative=((1.0, 0),), count=0, sum=0.0), 0.5)
    0.0
    """
    wanted = share * histogram.count
    below, faster = 0.0, 0
    if not histogram.count:
        return 0.0
    for bound, count in histogram.cumulative:
        if count >= wanted and count > faster:
            return below + (bound - below) * (wanted - faster) / (count - faster)
        below, faster = bound, count
    return below


def _cells(states: bytes, cells: int) -> list[list[int]]:
    """How many pages of each cell are in each of `CELL_STATES`; cells differ by one page at most."""
    total = len(states)
    cells = min(cells, total)
    bounds = [number * total // cells for number in range(cells + 1)]
    # bytes.count() goes over a slice of the table in C: 16 GiB of memory are four million bytes.
    return [
        [sum(states.count(state, first, last) for state in _COUNTED[name]) for name in CELL_STATES]
        for first, last in pairwise(bounds)
    ]
