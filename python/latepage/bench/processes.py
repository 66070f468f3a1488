"""The processes of a bench: C programs, and `latepage serve` as a user starts it. None outlives what started it."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from latepage.errors import LatepageError

__all__ = ["Pager", "ask", "cpu_seconds", "server"]

PATIENCE = 120.0
"""Seconds that anything may take: longer is a failure, not a figure."""


def ask(*command: str | Path) -> dict[str, Any]:
    """What a program says in its last line of JSON, once it has ended.

    Raises:
        LatepageError: it failed.
    """
    try:
        done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise LatepageError(f"{Path(command[0]).name} has not ended in {PATIENCE:g} s") from None
    if done.returncode:
        why = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise LatepageError(f"{Path(command[0]).name} failed: {why}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    return said


def cpu_seconds(pid: int) -> float:
    """What all threads of a process have used so far, those that are gone included."""
    # clock_getcpuclockid(3) in nanoseconds; /proc/PID/stat counts in hundredths of a second.
    return time.clock_gettime((~pid << 3) | 2)


@contextmanager
def server(*command: str | Path, socket: Path) -> Iterator["subprocess.Popen[str]"]:
    """A C program that serves at a socket, from when it listens to the end of the block."""
    socket.unlink(missing_ok=True)
    # In a group of its own: Ctrl-C is for the bench, which ends everything in order.
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        try:
            assert process.stdout is not None  # noqa: S101 (it was asked for)
            assert process.stderr is not None  # noqa: S101
            if process.stdout.readline().strip() != "listening":
                raise LatepageError(f"{Path(words[0]).name} failed: {process.stderr.read().strip()}")
            try:
                yield process
            except LatepageError as error:
                if process.poll() is None:
                    raise
                # Whoever waits for a server that has died waits in vain: that it died is the reason.
                raise LatepageError(f"{Path(words[0]).name} ended: {process.stderr.read().strip()}") from error
        finally:
            process.kill()
            process.wait()
            socket.unlink(missing_ok=True)


class Pager:
    """`latepage serve` as a process.

    Args:
        socket: where it listens.
        memory: the memory file.
        flags: of `latepage serve`.
        cores: it may run on these only; None leaves it as it is.
    """

    def __init__(self, socket: Path, memory: Path, *flags: str, cores: Sequence[int] | None = None) -> None:
        self.socket = socket
        command = [sys.executable, "-m", "latepage", "serve", str(socket), str(memory), "--json", *flags]
        self._said = socket.with_suffix(".said").open("w+")
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._said, stdin=subprocess.DEVNULL, text=True, process_group=0
        )
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            if cores is not None:
                # It has no other threads yet, and those that it makes inherit this.
                os.sched_setaffinity(self._process.pid, cores)
            self.event("listening")
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Pager":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 (it was asked for)
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def event(self, *names: str) -> dict[str, Any]:
        """The next event of one of these names; what comes before it is dropped.

        Raises:
            LatepageError: the pager ended, or refused or lost a VM, or nothing came in time.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise LatepageError(f"latepage serve has not told of {' or '.join(names)} in {PATIENCE:g} s") from None
            if event is None:
                self._said.seek(0)
                raise LatepageError(f"latepage serve ended: {self._said.read().strip()}")
            if event["event"] in names:
                return event
            if event["event"] in ("refused", "failed"):
                raise LatepageError(f"latepage serve: {event.get('reason')}", vm=event.get("vm"))

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def resident(self) -> int:
        """Bytes of its anonymous resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))

    def end(self) -> None:
        """Its VMs are gone or of no further use, so there is nothing to drain."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._said.close()
        for path in (self.socket, self.socket.with_suffix(".said")):
            with suppress(FileNotFoundError):
                path.unlink()
