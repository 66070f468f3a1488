"""Threads on which a user's function is called: what they may not call, and how its errors are told."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from latepage.errors import LatepageError, PagerError

__all__ = ["Told", "called_for", "refuse_in_callback", "summary"]

_here = threading.local()


@contextmanager
def called_for(whom: str) -> Iterator[None]:
    """What runs in this block is the callback of `whom`."""
    _here.whom = whom
    try:
        yield
    finally:
        del _here.whom


def refuse_in_callback(call: str) -> None:
    """To be called first by whatever may wait for a pager.

    Raises:
        PagerError: this is the thread of a callback, and the pager may be waiting for this very thread.
    """
    whom: str | None = getattr(_here, "whom", None)
    if whom is not None:
        raise PagerError(
            f"{call} was called by {whom} on the thread that the pager may be waiting for, and would wait for ever; "
            "have another thread call it",
            call=call,
        )


def summary(error: BaseException) -> str:
    """What an exception says, in one line that can be written anywhere.

    >>> summary(KeyError("page"))
    "KeyError: 'page'"
    >>> summary(PagerError("plain words"))
    'plain words'
    """
    try:
        text = " ".join(str(error).split())[:500]
    except BaseException:  # an exception of the user's may do anything here too
        text = "its text cannot be had"
    kind = type(error).__name__
    if not isinstance(error, LatepageError):
        text = f"{kind}: {text}" if text else kind
    return text.encode(errors="backslashreplace").decode()


class Told:
    """Tells of the first error of a callback with its traceback, through the logger `latepage`. Events name every one of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def error(self, text: str, error: BaseException) -> None:
        """The first time only: the text, and where the error came from."""
        if self._first("error"):
            self._log("error", f"{text}: {summary(error)} (the traceback is given once; events name every failure)", error)

    def warning(self, text: str) -> None:
        """The first time only."""
        if self._first("warning"):
            self._log("warning", text, None)

    def _first(self, kind: str) -> bool:
        with self._lock:
            first = kind not in self._told
            self._told.add(kind)
            return first

    @staticmethod
    def _log(level: str, text: str, error: BaseException | None) -> None:
        import logging  # at the first error is early enough

        # A handler of the user's that fails must not end the thread.
        with suppress(BaseException):
            logger = logging.getLogger("latepage")
            logger.log(logging.ERROR if level == "error" else logging.WARNING, "%s", text, exc_info=error)
