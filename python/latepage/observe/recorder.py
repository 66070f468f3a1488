"""Writes one trace a VM while a pager serves: off the path of faults, and without handling single entries."""

import os
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from latepage import _core
from latepage.errors import TraceError
from latepage.observe.trace_format import regions_as_json
from latepage.observe.trace_writer import TraceWriter
from latepage.pager import Pager
from latepage.session import Session

__all__ = ["RING", "Recorder"]

RING = 1 << 16
"""Entries of a trace ring that is recorded: 1 MiB a VM. docs/trace.md says what decided it."""

PAUSE = 0.01
"""Seconds between two looks at the rings; an event of the pager's is a reason to look at once."""
SHARE = 4
"""After each look comes a pause so many times as long as it used the CPU: recording many VMs takes a fifth of a core at most."""


@dataclass(slots=True)
class _Recording:
    native: _core.Session
    session: Session
    writer: TraceWriter
    cursor: int = 0
    lost: int = 0
    # Seen to be over at the last look: whatever was still being recorded then has been by now.
    over: bool = field(default=False)


def _say(what: str) -> None:
    print(f"latepage: {what}", file=sys.stderr, flush=True)


class Recorder:
    """Records the VMs of a pager, as a context manager: each gets `VM.trace` in a folder.

    A file grows under the name `VM.trace.part`, and gets its own when the VM's session is over, or the recorder ends. None that
    is there is overwritten: a number is added. Use a policy with `trace=RING`: a session without a ring cannot be recorded.

    Args:
        pager: whose VMs.
        folder: where the traces go; made, for its owner alone, if it is not there.
        report: takes each line about what could not be recorded; by default it goes to standard error. A disk that is full,
            and the like, is reported once, and no VM is harmed by it.

    Raises:
        TraceError: the folder cannot be made or written to.
    """

    def __init__(self, pager: Pager, folder: str | os.PathLike[str], *, report: Callable[[str], None] = _say) -> None:
        self._pager = pager
        self._folder = Path(folder)
        self._report = report
        self._arrivals = pager._native.arrivals()
        self._recordings: list[_Recording] = []
        self._failed = 0
        self._stopping = False
        self._stop = -1
        self._thread: threading.Thread | None = None
        try:
            self._folder.mkdir(0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise TraceError(f"{folder}: is no folder; name a folder for the traces, or one to be made", call="mkdir") from None
        except OSError as error:
            message = f"{folder}: no folder for traces can be made: {error.strerror}"
            raise TraceError(message, call="mkdir", errno=error.errno) from None
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise TraceError(f"{folder}: cannot be written to; name a folder for the traces that can", call="access")

    def __enter__(self) -> Self:
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="latepage-record", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes what is still to be had, and ends every file."""
        if self._thread is not None:
            self._stopping = True
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            self._thread = None
            os.close(self._stop)
        if self._failed > 1:
            self._report(f"{self._failed} VMs in all could not be recorded, or not to their end")
            self._failed = 0

    def _run(self) -> None:
        with select.epoll() as poll:
            poll.register(self._stop, select.EPOLLIN)
            # Each event wakes us once, whether or not others have read it.
            poll.register(self._pager.fileno(), select.EPOLLIN | select.EPOLLET)
            while not self._stopping:
                # What others keep the CPU for does not count: the rings fill up meanwhile.
                began = time.thread_time()
                self._look()
                time.sleep(SHARE * (time.thread_time() - began))
                poll.poll(PAUSE)
        self._look()
        for recording in self._recordings:
            self._finish(recording)
        self._recordings.clear()

    def _look(self) -> None:
        for native in self._arrivals.take():
            if (recording := self._begin(native)) is not None:
                self._recordings.append(recording)
        self._recordings = [recording for recording in self._recordings if self._follow(recording)]

    def _begin(self, native: _core.Session) -> _Recording | None:
        session = Session(native)
        if not native.trace_capacity:
            self._fail(f"{session.name}: not recorded, since its policy keeps no trace: give it Policy(trace=RING)")
            return None
        populates, fault_around = native.bringing
        header = {
            "vm": session.name,
            "pid": session.pid,
            "form": session.form,
            "backing": session.backing,
            "vcpus": native.vcpus,
            "source": native.source,
            "started": time.time() - native.age,
            "regions": regions_as_json(session.regions),
            "populate": "background" if populates else "none",
            "fault_around": fault_around,
            "ring": native.trace_capacity,
            "latepage": _core.__version__,
        }
        try:
            return _Recording(native, session, TraceWriter(self._folder, session.name, header))
        except OSError as error:
            self._fail(f"{session.name}: cannot be recorded in {self._folder}: {error.strerror}; the VM goes on")
            return None

    def _follow(self, recording: _Recording) -> bool:
        """Writes what came since the last look. Returns whether there may be more."""
        over = recording.native.closed
        try:
            self._take(recording)
        except OSError as error:
            self._abandon(recording, error)
            return False
        if recording.over:
            self._finish(recording)
        done, recording.over = recording.over, over
        return not done

    def _take(self, recording: _Recording) -> None:
        records, recording.cursor, lost = recording.native.trace_raw(recording.cursor)
        if lost:
            recording.lost += lost
            recording.writer.lost(lost, recording.native.age)
        recording.writer.write(records)

    def _finish(self, recording: _Recording) -> None:
        stats = recording.session.stats
        fields = {
            "end": recording.native.end or "stopped",
            "seconds": recording.native.age,
            "lost": recording.lost,
            "counters": stats.counters,
            "latency": {name: getattr(stats.latency, name) for name in ("count", "mean", "p50", "p99", "max")},
        }
        try:
            recording.writer.finish(fields)
        except OSError as error:
            self._abandon(recording, error)

    def _abandon(self, recording: _Recording, error: OSError) -> None:
        recording.writer.close()
        name, path = recording.session.name, recording.writer.path
        self._fail(f"{name}: recorded no further: {path}: {error.strerror}; the VM goes on, and the file is good up to there")

    def _fail(self, what: str) -> None:
        """Says what went wrong, the first time; after that it is counted."""
        self._failed += 1
        if self._failed == 1:
            self._report(what)
