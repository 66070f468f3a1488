"""A VM in a process of its own, as a child of this one."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from latepage.errors import GuestError
from latepage.kvm.client import Client
from latepage.kvm.jobs import Job, JobReport
from latepage.kvm.vm import Backing, Delivery, Guest, Handshake, Shards, Trap

__all__ = ["VmProcess"]


class VmProcess:
    """A child process that runs one VM (`python -m latepage.kvm`) and tells what happens to it.

    Attributes:
        process: the child.
        api_sock: its API socket, if it has one.
    """

    def __init__(self, arguments: Iterable[str], *, api_sock: str | Path | None = None) -> None:
        command = [sys.executable, "-m", "latepage.kvm", *arguments]
        self.api_sock = None if api_sock is None else str(api_sock)
        if self.api_sock is not None:
            command += ["--api-sock", self.api_sock]
        # Standard error goes to a pipe of its own, and holds at most the one line that says why the VM could not be.
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @classmethod
    def create(
        cls,
        *jobs: Job,
        memory: int,
        backing: Backing = "anonymous",
        vcpus: int = 1,
        split: bool = False,
        guest: Guest = "auto",
        name: str | None = None,
        compare: bool = False,
        save: tuple[str | Path, str | Path] | None = None,
        api_sock: str | Path | None = None,
    ) -> Self:
        """A VM with zeroed memory that runs `jobs`; the arguments are those of `Vm.create` and `latepage.kvm.host.Life`."""
        arguments = ["create", "--memory", str(memory), "--backing", backing, "--vcpus", str(vcpus)]
        arguments += ["--split"] if split else []
        return cls([*arguments, *_common(jobs, guest, name, compare, save)], api_sock=api_sock)

    @classmethod
    def restore(
        cls,
        state_file: str | Path,
        *jobs: Job,
        read: str | Path | None = None,
        map_file: str | Path | None = None,
        late: str | Path | None = None,
        delivery: Delivery | None = None,
        trap: Trap | None = None,
        window: int | None = None,
        pager: str | Path | None = None,
        notify_all: bool = False,
        handshake: Handshake = "latepage",
        send_memory: bool | None = None,
        shards: Shards | None = None,
        backing: Backing | None = None,
        guest: Guest = "auto",
        name: str | None = None,
        paused: bool = False,
        compare: bool = False,
        save: tuple[str | Path, str | Path] | None = None,
        api_sock: str | Path | None = None,
    ) -> Self:
        """A saved VM that runs `jobs`, its memory from one of `read`, `map_file`, `late` (memory files) and `pager` (a socket).

        The other arguments are those of `Vm.restore`.
        """
        arguments = ["restore", str(state_file)]
        files = ("--read", read), ("--map", map_file), ("--late", late), ("--pager", pager), ("--backing", backing)
        for flag, value in (*files, ("--delivery", delivery), ("--trap", trap), ("--window", window)):
            arguments += [] if value is None else [flag, str(value)]
        if pager is not None:
            arguments += ["--handshake", handshake]
            arguments += [] if send_memory is None else ["--send-memory", "yes" if send_memory else "no"]
            arguments += [] if shards is None else ["--shards", str(shards)]
        arguments += ["--notify-all"] if notify_all else []
        arguments += ["--paused"] if paused else []
        return cls([*arguments, *_common(jobs, guest, name, compare, save)], api_sock=api_sock)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self.process.pid

    def events(self) -> Iterator[dict[str, Any]]:
        """The events as they come, until the child closes its output. Each event is given once."""
        assert self.process.stdout is not None  # noqa: S101 (it was asked for)
        for line in self.process.stdout:
            yield json.loads(line)

    def event(self, kind: str, accept: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """The next event of that kind; those before it are passed over.

        Raises:
            GuestError: if the VM ends without one; the message is what it said.
        """
        failed: str | None = None
        for event in self.events():
            if event["event"] == kind and accept(event):
                return event
            failed = event.get("error") or failed
        status = self.process.wait()
        assert self.process.stderr is not None  # noqa: S101 (it was asked for)
        said = self.process.stderr.read().strip().removeprefix("latepage.kvm: ")
        why = failed or said or (f"signal {-status}" if status < 0 else f"exit status {status}")
        raise GuestError(f"the VM ended before it told of {kind!r}: {why}")

    def done(self) -> JobReport:
        """Waits until the next job is over."""
        return JobReport.from_json(self.event("job_done")["report"])

    def client(self) -> Client:
        """A new connection to its API socket. Wait for the event `started` first."""
        if self.api_sock is None:
            raise GuestError("this VM has no API socket: start it with api_sock")
        return Client(self.api_sock)

    def end(self, timeout: float = 30) -> int:
        """Ends the child by SIGTERM, if it lives, and returns its exit status (negative: the signal that killed it)."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=timeout)
        return self.process.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits until the child has ended, and returns its exit status. Events that were not taken are lost."""
        self.process.communicate(timeout=timeout)
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.end()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


def _common(
    jobs: Iterable[Job],
    guest: Guest,
    name: str | None,
    compare: bool,
    save: tuple[str | Path, str | Path] | None,
) -> list[str]:
    arguments = ["--guest", guest]
    arguments += [] if name is None else ["--name", name]
    for job in jobs:
        arguments += ["--job", json.dumps(job.to_json())]
    arguments += ["--compare"] if compare else []
    arguments += [] if save is None else ["--save", str(save[0]), str(save[1])]
    return arguments
