"""What a command says to whoever listens: a reader who has gone is no reason to let VMs down."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["listening_or_not", "mute", "open_standard_streams", "say"]


def open_standard_streams() -> None:
    """What the caller has closed (`>&-`) leads nowhere from now on, so that no file or socket of ours takes its number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # It takes the lowest number that is free, which is this one.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (for as long as the process lives)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def mute(stream: TextIO) -> None:
    """Has all that is still written to a stream lead nowhere, and what waits in its buffer too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def listening_or_not() -> Iterator[None]:
    """For writing to standard error: where its reader has gone, or the terminal was closed, it is muted."""
    try:
        yield
    except OSError:
        mute(sys.stderr)


def say(text: str) -> None:
    """A line to standard error."""
    with listening_or_not():
        print(text, file=sys.stderr, flush=True)
