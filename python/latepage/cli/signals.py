"""SIGTERM, SIGINT and SIGHUP as something to poll, so that a loop that waits for events hears them at once."""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

__all__ = ["Signals"]

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """While it is entered, these signals do not end the process: `take` gives those that have arrived.

    A SIGHUP that was ignored before, as nohup(1) has it, is ignored still.
    """

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # A handler in Python must be there for the interpreter to write to the descriptor.
        heard = [number for number in HEARD if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, _ignore) for number in heard}
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        """Readable while a signal waits to be taken."""
        return self._read

    def take(self) -> list[signal.Signals]:
        """The signals that arrived since the last call."""
        try:
            arrived = os.read(self._read, 64)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in arrived if number in self._before]


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass
