"""latepage supplies a virtual machine's memory late: page by page, at the moment the guest touches it.

>>> import latepage
>>> sorted(name for name in latepage.__all__ if name[0].islower())
['open_source']
"""

from latepage._core import __version__
from latepage.errors import (
    CheckError,
    FirecrackerError,
    GuestError,
    LatepageError,
    ListenError,
    PagerError,
    PolicyError,
    SessionError,
    SourceError,
    TraceError,
)
from latepage.events import Event
from latepage.memory import PageState, Region
from latepage.pager import Fallback, Pager
from latepage.policy import Policy
from latepage.session import Progress, Session
from latepage.source import CallbackSource, FileSource, Source, open_source
from latepage.stats import Histogram, Latency, Stats, TraceEntry

__all__ = [
    "CallbackSource",
    "CheckError",
    "Event",
    "Fallback",
    "FileSource",
    "FirecrackerError",
    "GuestError",
    "Histogram",
    "Latency",
    "LatepageError",
    "ListenError",
    "PageState",
    "Pager",
    "PagerError",
    "Policy",
    "PolicyError",
    "Progress",
    "Region",
    "Session",
    "SessionError",
    "Source",
    "SourceError",
    "Stats",
    "TraceEntry",
    "TraceError",
    "__version__",
    "open_source",
]
