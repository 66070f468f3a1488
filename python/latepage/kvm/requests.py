"""What can be asked of a VM, whether it is in this process or at the other end of a socket."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from latepage.errors import GuestError
from latepage.kvm.jobs import Comparison, Job, JobReport

__all__ = ["LateReport", "NotifyReport", "Report", "Requests", "SaveReport", "result_of"]


@dataclass(frozen=True)
class SaveReport:
    """What saving wrote.

    Attributes:
        memory_bytes: length of the memory file.
        data_bytes: how much of it is data; the rest are holes.
        ns: how long it took, in nanoseconds.
    """

    memory_bytes: int
    data_bytes: int
    ns: int


@dataclass(frozen=True)
class LateReport:
    """What a VMM has brought that brings its memory itself.

    Attributes:
        delivery: `uffd` or `exit`.
        trap: what makes a vCPU's access an exit: `bitmap`, `attributes`, or None.
        memory_file: where pages come from.
        exits: memory-fault exits.
        faults: faults by userfaultfd: KVM's own accesses, the VMM's, and those of vCPUs where there are no exits.
        joined: of both, those for a page that was on its way already.
        present: of both, those for a page that was there when they were looked at.
        filled: pages filled from the memory file.
        zero: pages that came as zero.
        beside: pages that came beside one that was wanted.
    """

    delivery: str
    trap: str | None
    memory_file: str
    exits: int
    faults: int
    joined: int
    present: int
    filled: int
    zero: int
    beside: int


@dataclass(frozen=True)
class NotifyReport:
    """What a VMM has done whose threads post to a pager.

    Attributes:
        delivery: `notify`.
        trap: what makes a vCPU's access an exit: `bitmap`, `attributes`, or None.
        all: whether the pager has no userfaultfd: everything is posted.
        socket: the pager's.
        exits: accesses that came back to the thread that made them: memory-fault exits, or signals.
        posted: faults that were posted.
        forwarded: of those, faults that came by userfaultfd: KVM's own accesses, and the VMM's.
        removed: discards that were posted, each of pages of one region.
        connected: how often a pager was handed the VM: once, and once more after each one that went away.
    """

    delivery: str
    trap: str | None
    all: bool
    socket: str
    exits: int
    posted: int
    forwarded: int
    removed: int
    connected: int


@dataclass(frozen=True)
class Report:
    """A VM at a glance. Times are nanoseconds of CLOCK_MONOTONIC since the VM began to be created or restored.

    Attributes:
        name: its name.
        pid: the process that it lives in.
        guest: `kvm`, or `threads` where threads stand in for the guest.
        status: `running`, `paused` or `failed`.
        error: why it failed.
        vcpus: how many vCPUs it has.
        backing: what its memory is made of.
        memory: bytes of memory.
        pages: how many pages are fingerprinted: all but the first 2 MiB.
        contents: pages by the seed written to them last (None: they are zero).
        pager: the pager's socket and the form of the handshake, if a pager brings its memory.
        shards: how many userfaultfds the pager has, each over a shard of the memory, and what was done instead of what `auto`
            stands for (None: just that).
        late: what has come, and how, if the VMM itself brings its memory.
        notify: what the VMM's side has done, if its threads post to a pager.
        origin_monotonic_ns: CLOCK_MONOTONIC when the VM began to be created or restored.
        ready_ns: when it was ready to run.
        first_instruction_ns: when the guest ran its first instruction.
        job: the job that runs or is paused.
        last_job: the last job that ended.
    """

    name: str
    pid: int
    guest: str
    status: str
    error: str | None
    vcpus: int
    backing: str
    memory: int
    pages: int
    contents: dict[int | None, int]
    pager: tuple[str, str] | None
    shards: tuple[int, str | None] | None
    late: LateReport | None
    notify: NotifyReport | None
    origin_monotonic_ns: int
    ready_ns: int
    first_instruction_ns: int | None
    job: JobReport | None
    last_job: JobReport | None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """From an answer."""
        own = dict(fields)
        own["contents"] = dict(fields["contents"])
        own["pager"] = tuple(fields["pager"]) if fields["pager"] else None
        own["notify"] = NotifyReport(**fields["notify"]) if fields["notify"] else None
        own["shards"] = tuple(fields["shards"]) if fields["shards"] else None
        own["late"] = LateReport(**fields["late"]) if fields["late"] else None
        for job in ("job", "last_job"):
            own[job] = JobReport.from_json(fields[job]) if fields[job] else None
        return cls(**own)


def result_of(answer: str, vm: str | None) -> Any:
    """The result in an answer.

    Raises:
        GuestError: if the answer is a refusal.
    """
    fields = json.loads(answer)
    if not fields["ok"]:
        raise GuestError(fields["error"], vm=vm)
    return fields["result"]


class Requests(ABC):
    """The requests that a VM answers. Each raises `GuestError` where it is refused, or cannot be done."""

    @abstractmethod
    def request(self, what: str, **fields: Any) -> Any:
        """Asks for `what` and returns the result as plain JSON."""

    def run(self, job: Job) -> None:
        """Starts a job and does not wait for it. A paused VM begins with it when it is resumed."""
        self.request("run", job=job.to_json())

    def wait(self, timeout: float | None = None) -> JobReport:
        """Waits until no job runs, for `timeout` seconds at most.

        Returns:
            The last job's report.

        Raises:
            TimeoutError: if one still runs.
            GuestError: if none ever ran.
        """
        result = self.request("wait", timeout=timeout)
        if result is not None:
            return JobReport.from_json(result)
        if self.report().job is not None:
            raise TimeoutError(f"the job was not over after {timeout} s")
        raise GuestError("no job was ever run")

    def pause(self) -> None:
        """Takes the vCPUs out of the guest."""
        self.request("pause")

    def resume(self) -> None:
        """Lets them go on."""
        self.request("resume")

    def stop(self) -> None:
        """Ends the job as far as it is; not one that writes."""
        self.request("stop")

    def save(self, state_file: str | Path, memory_file: str | Path) -> SaveReport:
        """Saves the VM, each file whole or not at all. A running VM is paused for the time."""
        paths = {"state_file": str(Path(state_file).absolute()), "memory_file": str(Path(memory_file).absolute())}
        return SaveReport(**self.request("save", **paths))

    def clock(self, gpa: int, *, vcpu: int = 0) -> None:
        """Has KVM keep a vCPU's clock at this guest-physical address (32 bytes), as a guest's kernel asks it to."""
        self.request("clock", vcpu=vcpu, gpa=gpa)

    def discard(
        self,
        first: int | None = None,
        count: int | None = None,
        *,
        gpa: int | None = None,
        size: int | None = None,
    ) -> None:
        """Gives pages back to the host, as a balloon does: `count` from page `first`, or `size` bytes at `gpa`."""
        if gpa is None:
            self.request("discard", first=first, count=1 if count is None else count)
        else:
            self.request("discard", gpa=gpa, bytes=size)

    def report(self) -> Report:
        """The VM at a glance."""
        return Report.from_json(self.request("report"))

    def compare(self) -> Comparison:
        """Compares every byte of guest memory with what it should be."""
        return Comparison.from_json(self.request("compare"))

    def quit(self) -> None:
        """Asks the VM to end."""
        self.request("quit")
