"""A process that answers in lines of JSON, and a reader that waits for one of them, never for a span of time."""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Self

Line = dict[str, Any]

PATIENCE = 10.0
"""Seconds after which a test gives up on an event. No test is faster or slower for it."""


class LineProcess:
    """A child process whose standard output is lines of JSON; every line read so far is kept in `lines`."""

    def __init__(self, command: Sequence[str | Path], **options: Any) -> None:
        self._stderr: IO[bytes] = options.pop("stderr_file", None) or open(os.devnull, "wb")  # noqa: SIM115, PTH123
        self.child = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            **options,
        )
        self.lines: list[Line] = []
        self._pending = b""
        self._taken: set[int] = set()

    @property
    def pid(self) -> int:
        return self.child.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout, self._stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def send(self, **line: Any) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(line).encode() + b"\n")
        self.child.stdin.flush()

    def wait_for(self, wanted: Callable[[Line], bool], what: str = "", patience: float = PATIENCE) -> Line:
        """The first line for which `wanted` holds, and that was not given out before."""
        deadline = time.monotonic() + patience
        index = 0
        while True:
            while index < len(self.lines):
                if index not in self._taken and wanted(self.lines[index]):
                    self._taken.add(index)
                    return self.lines[index]
                index += 1
            if not self._read(deadline):
                came = "\n".join(map(str, self.lines[-20:]))
                raise AssertionError(f"{what or 'the line'} never came; what came:\n{came}\n{self.said()}")

    def event(self, name: str, patience: float = PATIENCE, **fields: Any) -> Line:
        """The next event of that name, with these fields."""

        def wanted(line: Line) -> bool:
            return line.get("event") == name and all(line.get(key) == value for key, value in fields.items())

        return self.wait_for(wanted, f"{name} {fields}", patience)

    def seen(self, name: str) -> list[Line]:
        """Every event of that name that was read so far."""
        return [line for line in self.lines if line.get("event") == name]

    def said(self) -> str:
        """What it wrote to standard error, as far as that is kept."""
        return ""

    def signal(self, number: signal.Signals) -> None:
        self.child.send_signal(number)

    def finish(self, patience: float = PATIENCE) -> int:
        """Reads what is still to come, until the process has ended; its exit code."""
        deadline = time.monotonic() + patience
        while self._read(deadline):
            pass
        return self.child.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        assert self.child.stdout is not None
        ready, _, _ = select.select([self.child.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        data = os.read(self.child.stdout.fileno(), 1 << 16)
        *complete, self._pending = (self._pending + data).split(b"\n")
        self.lines += [json.loads(line) for line in complete if line.startswith(b"{")]
        return bool(data)
