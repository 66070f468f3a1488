"""C programs that are spoken to: a line to their standard input, a line of JSON from their standard output."""

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from latepage.errors import LatepageError

__all__ = ["Talker"]


class Talker:
    """A program, from its first line on; at the end of the block it is killed, if it has not ended.

    Args:
        command: the program and its arguments.
    """

    def __init__(self, *command: str | Path) -> None:
        self._name = Path(command[0]).name
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        try:
            self._answer()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._end()

    def ask(self, line: str) -> dict[str, Any]:
        """What it says to a line.

        Raises:
            LatepageError: it failed.
        """
        assert self._process.stdin is not None  # noqa: S101 (it was asked for)
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why, it says
        return self._answer()

    def finish(self) -> dict[str, Any]:
        """What it says when it hears that nothing more will be asked.

        Raises:
            LatepageError: it failed.
        """
        assert self._process.stdin is not None  # noqa: S101 (it was asked for)
        self._process.stdin.close()
        self._process.stdin = None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 (it was asked for)
        assert self._process.stderr is not None  # noqa: S101
        said = self._process.stdout.readline()
        if not said:
            raise LatepageError(f"{self._name} failed: {self._process.stderr.read().strip()}")
        answer: dict[str, Any] = json.loads(said)
        return answer

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()
