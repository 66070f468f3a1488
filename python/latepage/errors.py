"""What can go wrong, as one tree with one base.

Every error carries what is known of where it happened: the VM, the address, the call that failed, and its errno. The
message says what to do next.

```text
LatepageError
├── ListenError    the socket cannot be listened at
├── SourceError    the memory file cannot be served, or no longer
├── PolicyError    a policy's value makes no sense (a ValueError too)
├── CheckError     the process is no VMM, or may not be looked into
├── SessionError   the VM's memory has no such range, or its session is over
├── PagerError     the pager cannot start, or is closed
├── GuestError     the reference VMM, or its guest, failed
├── TraceError     a trace cannot be read, written or compared
└── FirecrackerError   Firecracker refused, failed, or is not there
```
"""

import os

__all__ = [
    "CheckError",
    "FirecrackerError",
    "GuestError",
    "LatepageError",
    "ListenError",
    "PagerError",
    "PolicyError",
    "SessionError",
    "SourceError",
    "TraceError",
]


class LatepageError(Exception):
    """The base of every error that latepage raises.

    Attributes:
        vm: name of the VM that was concerned, if one was.
        address: guest's address (in the VMM's process) or offset in the memory file, if one was concerned.
        call: the system call or operation that failed, as its manual page names it.
        errno: what the call gave.

    >>> error = SourceError("guest.mem: No such file or directory", call="open", errno=2)
    >>> isinstance(error, LatepageError), error.call, error.errno, error.vm
    (True, 'open', 2, None)
    """

    def __init__(
        self,
        message: str,
        *,
        vm: str | None = None,
        address: int | None = None,
        call: str | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.vm = vm
        self.address = address
        self.call = call
        self.errno = errno

    @property
    def strerror(self) -> str | None:
        """What the errno means.

        >>> PagerError("no userfaultfd", call="userfaultfd", errno=1).strerror
        'Operation not permitted'
        """
        return None if self.errno is None else os.strerror(self.errno)


class ListenError(LatepageError):
    """The socket cannot be listened at: it lives, it is a file, its path is too long, its folder is not there."""


class SourceError(LatepageError):
    """The memory file is missing, unreadable, empty, or not what a VM needs."""


class PolicyError(LatepageError, ValueError):
    """A policy's value makes no sense."""


class CheckError(LatepageError):
    """The process that is to be looked at does not exist, is no VMM, or may not be looked into."""


class SessionError(LatepageError):
    """The VM's memory has no such range, or its session is over."""


class PagerError(LatepageError):
    """The pager cannot start, or was closed."""


class GuestError(LatepageError):
    """The reference VMM, or its guest, failed."""


class FirecrackerError(LatepageError):
    """Firecracker refused what it was asked for, failed, or is not there. Its own words are passed on whole.

    Attributes:
        status: the HTTP status that its API answered with, if it answered.
        fault_message: what its API said.
        stderr: what it wrote to standard error before it ended.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        fault_message: str | None = None,
        stderr: str | None = None,
        vm: str | None = None,
        call: str | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message, vm=vm, call=call, errno=errno)
        self.status = status
        self.fault_message = fault_message
        self.stderr = stderr


class TraceError(LatepageError):
    """A trace is none, damaged, of another version, does not fit another one, or cannot be written."""
