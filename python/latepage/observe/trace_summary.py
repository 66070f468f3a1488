"""What a trace comes to, in figures."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from latepage.observe.trace_file import Trace

__all__ = ["Summary", "summarize", "time_to"]


@dataclass(frozen=True, slots=True)
class Summary:
    """One trace's figures. Pages are counted each time that they came; touched ones once each.

    Attributes:
        file: the file.
        vm: the VM's name.
        source: what its memory came from.
        started: when its session began, in seconds since 1970.
        pages: how many its memory has.
        size: bytes of its memory.
        touched: pages that the guest touched before they were there: its working set, as far as it could be seen.
        touched_bytes: bytes of them.
        beside: pages that were brought in beside a touched one: candidates only, since nobody saw whether the guest used them.
        populated: pages that population brought, before anyone asked.
        removed: pages that the VMM discarded.
        cleared: pages that the guest touched after they had been discarded, and got as zero.
        percent: the share of the touches that `seconds_to_percent` is about.
        seconds_to_percent: when so much of the working set had been touched, since the session began; None if nothing was.
        seconds: from the start of the session to the end of the recording, or to the last record where it is not whole.
        lost: entries that came faster than they could be recorded, and are missing.
        whole: whether the recording came to its end.
        end: how the session ended: `gone`, `detached`, `closed`, or `stopped` where only the recording did; None if not whole.
        readable: bytes of the file that could be read.
    """

    file: Path
    vm: str
    source: str
    started: float
    pages: int
    size: int
    touched: int
    touched_bytes: int
    beside: int
    populated: int
    removed: int
    cleared: int
    percent: float
    seconds_to_percent: float | None
    seconds: float
    lost: int
    whole: bool
    end: str | None
    readable: int


def summarize(trace: Trace, *, percent: float = 90) -> Summary:
    """A trace's figures.

    Args:
        trace: the trace.
        percent: above 0 and at most 100: the share of the working set for which the time is wanted.
    """
    came: Counter[str] = Counter()
    for run in trace.runs():
        came[run.reason] += run.pages
    touches = trace.touches()
    return Summary(
        file=trace.path,
        vm=trace.vm,
        source=trace.source,
        started=trace.started,
        pages=trace.pages,
        size=trace.size,
        touched=len(touches),
        touched_bytes=sum(size for _, size in trace.spans(touches)),
        beside=came["beside"],
        populated=came["population"],
        removed=came["removed"],
        cleared=came["cleared"],
        percent=percent,
        seconds_to_percent=time_to(touches, percent),
        seconds=trace.seconds,
        lost=trace.lost,
        whole=trace.whole,
        end=trace.end,
        readable=trace.readable,
    )


def time_to(touches: dict[int, float], percent: float) -> float | None:
    """When that share of the pages had been touched, in seconds; None where there are none.

    >>> time_to({7: 0.1, 3: 0.2, 9: 0.4}, 50), time_to({}, 50)
    (0.2, None)
    """
    if not touches:
        return None
    moments = sorted(touches.values())
    return moments[max(1, math.ceil(len(moments) * percent / 100)) - 1]
