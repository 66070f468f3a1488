"""The life of a VM that has a process for itself: its jobs one after the other, then whatever its API socket is asked for.

Every event is given to `tell` as a dictionary; docs/vm.md lists them. `python -m latepage.kvm` prints them as lines of JSON.
"""

import os
import select
import signal
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
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
    steps: deque[Callable[[], None]] = field(default_factory=deque)


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

        kept = ("pid", "guest", "backing", "vcpus", "memory", "pages", "origin_monotonic_ns", "ready_ns")
        say("started", **{key: report[key] for key in kept}, api_sock=life.api_sock)
        outcome = _Outcome()
        _plan(life, vm, outcome, say)
        _attend(life, vm, signals, outcome, say)
        say("ended", error=outcome.error)
        return 1 if outcome.wrong or outcome.error else 0


def _plan(life: Life, vm: Vm, outcome: _Outcome, say: Callable[..., None]) -> None:
    """The steps of a life. Each may wait, and so runs on a thread of its own."""

    def compare() -> None:
        result = vm.request("compare")
        outcome.wrong |= bool(result["wrong_pages"] or result["wrong_system"])
        say("compared", **result)

    def save() -> None:
        state_file, memory_file = life.save or ("", "")
        say("saved", state_file=state_file, memory_file=memory_file, **vars(vm.save(state_file, memory_file)))

    def settle() -> None:
        # A restored VM may be in the middle of a job.
        vm.request("wait", timeout=None)

    def run(job: Job) -> None:
        vm.run(job)
        vm.request("wait", timeout=None)

    outcome.steps.append(settle)
    outcome.steps.extend(lambda job=job: run(job) for job in life.jobs)  # type: ignore[misc]
    if life.compare:
        outcome.steps.append(compare)
    if life.save:
        outcome.steps.append(save)


def _attend(life: Life, vm: Vm, signals: "_Signals", outcome: _Outcome, say: Callable[..., None]) -> None:
    """Passes events on while the steps are done, until the end."""
    over, steps_over = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def work() -> None:
        try:
            while outcome.steps:
                outcome.steps.popleft()()
        except GuestError as error:
            # What is refused because the VM is being ended is no error.
            if not outcome.over:
                outcome.error = outcome.error or str(error)
        finally:
            os.write(steps_over, b"x")

    worker = threading.Thread(target=work, name="steps", daemon=True)
    worker.start()
    stay = life.stay or life.api_sock is not None
    poll = select.poll()
    for descriptor in (vm.fileno(), signals.fileno(), over):
        poll.register(descriptor, select.POLLIN)
    try:
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if signals.fileno() in ready:
                say("signalled")
                break
            # The steps' last events are there before their end is seen.
            if not _pass_on(vm, outcome, say):
                break
            if over in ready:
                poll.unregister(over)
                if outcome.error is not None or not stay:
                    break
                say("idle")
    finally:
        outcome.over = True
        outcome.steps.clear()
        vm.close()
        # It may wait in the kernel for a page that nobody brings; only the end of the process helps then.
        worker.join(timeout=1)
        os.close(over)


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
    """While it is entered, SIGTERM and SIGINT are something to poll."""

    def __enter__(self) -> "_Signals":
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._before = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
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
