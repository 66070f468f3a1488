"""A Firecracker as a process: started, watched by its pidfd, and ended for certain."""

import asyncio
import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from latepage.errors import FirecrackerError
from latepage.firecracker.output import OutputReader, Tail, lines_at_end
from latepage.reach import Owner

__all__ = ["VmmProcess", "find_program"]

_ROOM = 256 << 10
"""Bytes that a VMM may write before we read."""

_left_alone: list["subprocess.Popen[bytes]"] = []
"""Children that go on without us. They are kept here because a Popen that is forgotten while its child lives warns."""


def find_program(name: str | os.PathLike[str]) -> Path:
    """The program of that name, on PATH where it has no folder.

    Raises:
        FirecrackerError: there is none, or it may not be executed.
    """
    text = os.fspath(name)
    if os.sep not in text:
        found = shutil.which(text)
        if found is None:
            raise FirecrackerError(f"{text}: there is no such program on PATH; install it, or say where it is", call="execve")
        return Path(found)
    path = Path(text)
    if not path.is_file():
        raise FirecrackerError(f"{path}: there is no such program", call="execve")
    if not os.access(path, os.X_OK):
        raise FirecrackerError(f"{path}: it may not be executed: chmod +x {path}", call="execve")
    return path


class VmmProcess:
    """A VMM that we started.

    Attributes:
        pid: its process.
        pidfd: a descriptor of the process, readable when it has ended.
        console: the last of its standard output: the guest's console, and Firecracker's log; None where it goes to a file.
        stderr: the last of its standard error.
        is_child: whether it is the process that we started ourselves, so that its exit status can be had.
        stdin: the guest's console input.
    """

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        self._child = child
        self.pid = child.pid
        self.pidfd = os.pidfd_open(child.pid)
        self._status: int | None = None
        self.is_child = True
        self.stdin: BinaryIO | None = cast("BinaryIO | None", child.stdin)
        self.console: Tail | None = None
        self.stderr: Tail | None = None

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        reader: OutputReader,
        *,
        user: Owner | None = None,
        console: int | None = None,
    ) -> Self:
        """Starts a VMM in a session of its own, so that a terminal's Ctrl-C does not reach it.

        Args:
            command: the program and its arguments.
            reader: who reads its output.
            user: as whom it runs; as ourselves where there is none.
            console: a descriptor that its standard output goes to; None to keep the last of it.

        Raises:
            FirecrackerError: it cannot be started.
        """
        as_user = {} if user is None else {"user": user.uid, "group": user.gid, "extra_groups": ()}
        with contextlib.ExitStack() as stack:
            stdout, stdout_end = (None, console) if console is not None else _unbreakable_pipe(stack)
            stderr, stderr_end = _unbreakable_pipe(stack)
            child = cls._start(command, stdout_end, stderr_end, user, as_user)
            process = cls(child)
            process.console = None if stdout is None else reader.keep(os.dup(stdout))
            process.stderr = reader.keep(os.dup(stderr))
        return process

    @staticmethod
    def _start(
        command: Sequence[str], stdout: int, stderr: int, user: Owner | None, as_user: dict[str, Any]
    ) -> "subprocess.Popen[bytes]":
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                bufsize=0,
                **as_user,
            )
        except PermissionError as error:
            if user is not None and os.geteuid() != 0:
                raise FirecrackerError(
                    f"{command[0]} cannot run as {user}: that takes root, or leave --owner out", call="setuid", errno=error.errno
                ) from None
            raise FirecrackerError(f"{command[0]}: {error.strerror}", call="execve", errno=error.errno) from None
        except OSError as error:
            raise FirecrackerError(f"{command[0]}: {error.strerror}", call="execve", errno=error.errno) from None

    def become(self, pid: int) -> None:
        """The process that we started has started another in its place, and ended (the jailer, for a new pid namespace).

        Raises:
            FirecrackerError: that one has ended, too.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise FirecrackerError(
                f"the Firecracker with pid {pid} has ended already", call="pidfd_open", errno=error.errno
            ) from None
        os.close(self.pidfd)
        self.pid, self.pidfd, self.is_child = pid, pidfd, False
        self._child.wait()
        # That of the one before is not its own.
        self._status = None

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.pidfd >= 0 and not self.wait(0)

    @property
    def status(self) -> int | None:
        """Its exit status, or minus the signal that killed it; None while it lives, or where nobody can tell."""
        return self._status

    def wait(self, timeout: float | None) -> bool:
        """Waits until it has ended; whether it has."""
        if self.pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            return False
        if self.is_child:
            self._status = self._child.wait()
        return True

    async def ended(self) -> None:
        """Returns when it has ended."""
        loop = asyncio.get_running_loop()
        end: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            if not end.done():
                end.set_result(None)

        loop.add_reader(self.pidfd, tell)
        try:
            await end
        finally:
            loop.remove_reader(self.pidfd)
        self.wait(0)

    def send(self, text: bytes | str) -> None:
        """Types to the guest's console.

        Raises:
            FirecrackerError: the VMM has ended.
        """
        if self.stdin is None:
            raise FirecrackerError(f"the Firecracker with pid {self.pid} has no console", call="write")
        try:
            self.stdin.write(text.encode() if isinstance(text, str) else text)
        except OSError as error:
            raise FirecrackerError(f"the console of pid {self.pid}: {error.strerror}", call="write", errno=error.errno) from None

    def kill(self) -> None:
        """Ends it by SIGKILL, waits for that, and closes what we have of it."""
        if self.pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.wait(None)
        self._close()

    def leave(self) -> None:
        """Lets it go on without us."""
        if self.pidfd < 0:
            return
        if not self.wait(0) and self.is_child:
            _left_alone[:] = [child for child in _left_alone if child.poll() is None]
            _left_alone.append(self._child)
        self._close()

    def last_words(self, patience: float = 1.0) -> tuple[str, str]:
        """What it wrote to standard error, whole, and the last lines of its standard output, once it has ended."""
        words = []
        for tail in (self.stderr, self.console):
            if tail is not None:
                tail.wait_closed(patience)
            words.append("" if tail is None else tail.text().strip())
        return words[0], lines_at_end(words[1], 12)

    def how_it_ended(self) -> str:
        """Its exit status, in words."""
        if self._status is None:
            return "ended; how, cannot be told, since it was no child of ours"
        if self._status < 0:
            return f"was killed by {signal.Signals(-self._status).name}"
        return f"ended with status {self._status}"

    def _close(self) -> None:
        os.close(self.pidfd)
        self.pidfd = -1
        if self.stdin is not None:
            with contextlib.suppress(OSError):
                self.stdin.close()
            self.stdin = None


def _unbreakable_pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose writer is never held up by its reader, nor killed by the reader's end: both ends, closed with `stack`.

    A Firecracker whose standard output is a broken pipe does not live on: it logs each SIGPIPE, to its standard output. The
    writer's end is open for reading too, so that the pipe is never broken while it is open; and it does not block: what does
    not fit is lost to the writer.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    stack.callback(os.close, read)
    try:
        both = os.open(f"/proc/self/fd/{write}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(write)
    stack.callback(os.close, both)
    with contextlib.suppress(OSError):  # a user has so many pages for pipes, and no more
        fcntl.fcntl(both, fcntl.F_SETPIPE_SZ, _ROOM)
    return read, both
