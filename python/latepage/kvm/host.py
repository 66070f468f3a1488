"""The life of a VM that has a process for itself: its jobs one after the other, then whatever its API socket is asked for.

Every event is given to `tell` as a dictionary; docs/vm.md lists them. `python -m latepage.kvm` prints them as lines of JSON.
"""

import os
import select
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

from latepage.errors import GuestError
from latepage.kvm.jobs import Job
from latepage.kvm.vm import Vm

__all__ = ["Life", "live"]

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Life:
    """What a VM does from its beginning to its end.

    Attributes:
        config: as `Vm.from_config` takes it.
        jobs: run one after the other.
        compare: after the jobs, compare every byte.
        save: after that, save to (state file, memory file).
        api_sock: an API socket to answer at. A VM with one lives until it is told to end.
        stay: live on without one.
    """

    config: dict[str, Any]
    jobs: tuple[Job, ...] = ()
    compare: bool = False
    save: tuple[str, str] | None = None
    api_sock: str | None = None
    stay: bool = False


@dataclass
class _Outcome:
    """What has happened so far."""

    wrong: bool = False
    error: str | None = None
    over: bool = False


class _Steps:
    """What a VM does by itself, on a thread of its own since each step may wait. What it tells is told by the main thread."""

    def __init__(self, life: Life, vm: Vm, outcome: _Outcome) -> None:
        self._vm = vm
        self._outcome = outcome
        self._told: deque[dict[str, Any] | None] = deque()
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._steps: deque[Callable[[], None]] = deque()
        # A restored VM may be in the middle of a job.
        self._steps.append(self._settle)
        self._steps.extend(partial(self._run, job) for job in life.jobs)
        if life.compare:
            self._steps.append(self._compare)
        if life.save:
            self._steps.append(partial(self._save, *life.save))
        self._thread = threading.Thread(target=self._work, name="steps", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Readable while something waits to be taken."""
        return self._read

    def take(self) -> Iterator[dict[str, Any] | None]:
        """What there is to tell; None when all steps are over."""
        with suppress(BlockingIOError):
            os.read(self._read, 64)
        while self._told:
            yield self._told.popleft()

    def drop(self) -> None:
        """No further step."""
        self._steps.clear()

    def join(self) -> None:
        """Waits for the thread, unless it waits in the kernel for a page: then only the end of the process helps."""
        self._thread.join(timeout=1)
        if not self._thread.is_alive():
            os.close(self._read)
            os.close(self._write)

    def _tell(self, told: dict[str, Any] | None) -> None:
        self._told.append(told)
        # A full pipe is readable already.
        with suppress(BlockingIOError):
            os.write(self._write, b"x")

    def _work(self) -> None:
        try:
            while self._steps:
                self._steps.popleft()()
        except GuestError as error:
            # What is refused because the VM is being ended is no error.
            if not self._outcome.over:
                self._outcome.error = self._outcome.error or str(error)
        except IndexError:
            pass  # dropped between the look and the step
        finally:
            self._tell(None)

    def _settle(self) -> None:
        self._vm.request("wait", timeout=None)

    def _run(self, job: Job) -> None:
        self._vm.run(job)
        self._vm.request("wait", timeout=None)

    def _compare(self) -> None:
        result = self._vm.request("compare")
        self._outcome.wrong |= bool(result["wrong_pages"] or result["wrong_system"])
        self._tell({"event": "compared", **result})

    def _save(self, state_file: str, memory_file: str) -> None:
        saved = self._vm.save(state_file, memory_file)
        self._tell({"event": "saved", "state_file": state_file, "memory_file": memory_file, **vars(saved)})


def live(life: Life, tell: Tell) -> int:
    """Makes the VM and lives its life.

    Returns:
        The exit status: 0 if all went well (a SIGTERM is an end like any other), 1 if pages were wrong or the VM failed.

    Raises:
        GuestError: if the VM could not be made.
    """
    with _Signals() as signals, Vm.from_config(life.config) as vm:
        if life.api_sock is not None:
            vm.listen(life.api_sock)
        report = vm.request("report")
        name = report["name"]

        def say(event: str, **fields: Any) -> None:
            tell({"event": event, "vm": name, **fields})

        kept = ("pid", "guest", "backing", "vcpus", "memory", "pages", "shards", "origin_monotonic_ns", "ready_ns")
        say("started", **{key: report[key] for key in kept}, api_sock=life.api_sock)
        outcome = _Outcome()
        _attend(life, vm, signals, outcome, say)
        say("ended", error=outcome.error)
        return 1 if outcome.wrong or outcome.error else 0


def _attend(life: Life, vm: Vm, signals: "_Signals", outcome: _Outcome, say: Callable[..., None]) -> None:
    """Passes events on while the steps are done, until the end."""
    steps = _Steps(life, vm, outcome)
    stay = life.stay or life.api_sock is not None
    poll = select.poll()
    for descriptor in (vm, signals, steps):
        poll.register(descriptor, select.POLLIN)
    try:
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if signals.fileno() in ready:
                say("signalled")
                break
            # First the guest's events: a step's word comes after those of the jobs before it.
            if not _pass_on(vm, outcome, say):
                break
            told = list(steps.take()) if steps.fileno() in ready else []
            for event in told:
                if event is not None:
                    say(event.pop("event"), **event)
            if None in told:
                if outcome.error is not None or not stay:
                    break
                say("idle")
    finally:
        outcome.over = True
        steps.drop()
        vm.close()
        steps.join()


def _pass_on(vm: Vm, outcome: _Outcome, say: Callable[..., None]) -> bool:
    """Tells of the events that wait, and returns whether the VM lives on."""
    while (event := vm.next_event(0)) is not None:
        match event.pop("event"):
            case "quit":
                return False
            case "failed":
                outcome.error = event["error"]
                say("failed", **event)
                return False
            case kind:
                outcome.wrong |= kind == "wrong_page"
                say(kind, **event)
    return True


class _Signals:
    """While it is entered, SIGTERM, SIGINT and SIGHUP are something to poll."""

    def __enter__(self) -> "_Signals":
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        heard = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup(1) has it
            heard.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, _ignore) for number in heard}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        return self._read


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass
