"""What a guest is asked to do, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

__all__ = ["Action", "Comparison", "Job", "JobReport", "Order"]

Action = Literal["fill", "dirty", "verify", "touch", "say", "count"]
Order = Literal["sequential", "strided", "random"]


@dataclass(frozen=True)
class Job:
    """A job for all vCPUs of a VM, which divide the pages between them.

    Attributes:
        action: `fill` writes the fingerprint of `seed` to all pages, `dirty` to those given; `verify` checks that each page
            holds what was written to it last, or zeros; `touch` reads one word of each; `say` puts the first byte of each out by
            a string instruction, so that KVM itself reads it; `count` counts for ever.
        seed: the fingerprint to write, and the order drawn at random.
        order: the order in which each vCPU goes over its pages.
        pages: the pages as (first, count); all if None.
        progress_every: pages between two marks of progress; a tenth of all if None.

    >>> Job("verify", order="random", pages=((512, 64),)).to_json()
    {'action': 'verify', 'seed': 0, 'order': 'random', 'pages': [[512, 64]]}
    """

    action: Action
    seed: int = 0
    order: Order = "sequential"
    pages: tuple[tuple[int, int], ...] | None = None
    progress_every: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As requests and state files have it."""
        fields: dict[str, Any] = {"action": self.action, "seed": self.seed, "order": self.order}
        if self.pages is not None:
            fields["pages"] = [list(run) for run in self.pages]
        if self.progress_every is not None:
            fields["progress_every"] = self.progress_every
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The reverse of `to_json`.

        >>> Job.from_json(Job("fill", seed=3).to_json())
        Job(action='fill', seed=3, order='sequential', pages=None, progress_every=None)
        """
        pages = fields.get("pages")
        return cls(
            action=fields["action"],
            seed=fields.get("seed", 0),
            order=fields.get("order", "sequential"),
            pages=None if pages is None else tuple((first, count) for first, count in pages),
            progress_every=fields.get("progress_every"),
        )


@dataclass(frozen=True)
class JobReport:
    """What has come of a job. Times are nanoseconds of CLOCK_MONOTONIC since the VM began to be created or restored.

    Attributes:
        job: the job.
        pages: pages that it visits in all.
        done: pages visited; for `count`, how far it counted.
        wrong_pages: how many pages were not what they should be.
        wrong: the numbers of the first 64 of them.
        superseded: pages found changed since they were discarded meanwhile, and which did read as zero.
        started_ns: when it started.
        ended_ns: when its last vCPU was done; None while it runs.
        marks: (pages done, when).
    """

    job: Job
    pages: int
    done: int
    wrong_pages: int
    wrong: tuple[int, ...]
    superseded: int
    started_ns: int
    ended_ns: int | None
    marks: tuple[tuple[int, int], ...]

    @property
    def is_right(self) -> bool:
        """Whether it is over and found nothing wrong."""
        return self.ended_ns is not None and self.wrong_pages == 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """From an answer or an event."""
        return cls(
            job=Job.from_json(fields["job"]),
            pages=fields["pages"],
            done=fields["done"],
            wrong_pages=fields["wrong_pages"],
            wrong=tuple(fields["wrong"]),
            superseded=fields["superseded"],
            started_ns=fields["started_ns"],
            ended_ns=fields["ended_ns"],
            marks=tuple((done, ns) for done, ns in fields["marks"]),
        )


@dataclass(frozen=True)
class Comparison:
    """What comparing every byte of guest memory with what it should be has found.

    Attributes:
        pages: pages compared.
        wrong_pages: how many of them differ.
        wrong: the numbers of the first 64 of them.
        wrong_system: guest-physical addresses of pages below 2 MiB that are not what the VMM put there.
    """

    pages: int
    wrong_pages: int
    wrong: tuple[int, ...]
    wrong_system: tuple[int, ...]

    @property
    def is_right(self) -> bool:
        """Whether every byte is right."""
        return not self.wrong_pages and not self.wrong_system

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """From an answer or an event."""
        return cls(fields["pages"], fields["wrong_pages"], tuple(fields["wrong"]), tuple(fields["wrong_system"]))
