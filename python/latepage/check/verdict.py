"""From what was seen of a VM to a sentence about it."""

from dataclasses import dataclass
from typing import Literal

from latepage.check import proc
from latepage.check.capabilities import CAP_SYS_PTRACE, has_capability
from latepage.check.holders import Holder, Search
from latepage.memory import format_size

__all__ = ["Facts", "Judged", "Verdict", "judge", "unseen_processes"]

Verdict = Literal["served", "full", "stalls", "hangs", "unserved", "unseen"]
"""`served`; `full`: it needs no pager; `stalls`: its pager has read its faults and brings no page; `hangs`; `unserved`: it will
hang at its next fault or discard; `unseen`: nobody was seen to serve it, and not everybody could be seen."""

Judged = tuple[Verdict, str, str | None]
"""The verdict, the same in words, and what to do."""

END_IT = "end it and restore it anew: latepage cannot take a running VM over yet"
LOOK_FROM_OUTSIDE = "look from the host, with the number that the VMM has there"


@dataclass(frozen=True, slots=True)
class Facts:
    """What was seen.

    Attributes:
        process: the VMM.
        descriptors: its userfaultfds at the last look.
        regions: its registered memory.
        search: who else holds them.
        itself: whether it watches one of them itself.
        stuck: threads that waited during the whole look.
        lasting: faults that waited at every look, where no thread shows.
        looked: seconds.
        enclosed: whether the look was taken in a container, so that its pager may be where it does not show.
    """

    process: proc.Status
    descriptors: tuple[proc.Descriptor, ...]
    regions: tuple[proc.Region, ...]
    search: Search
    itself: bool
    stuck: tuple[proc.Thread, ...]
    lasting: int
    looked: float
    enclosed: bool

    @property
    def hanging(self) -> str:
        """What waits, in words; empty where nothing did."""
        pages = sum(thread.waits_for == "page" for thread in self.stuck) or self.lasting
        events = len(self.stuck) - sum(thread.waits_for == "page" for thread in self.stuck)
        said = [_count(pages, "fault")] if pages else []
        said += [_count(events, "discard")] if events else []
        verb = "has" if pages + events == 1 else "have"
        return f"{' and '.join(said)} {verb} waited for at least {self.looked:.1f} s" if said else ""

    @property
    def unread(self) -> int:
        """Faults that nobody has read."""
        return sum(descriptor.pending for descriptor in self.descriptors)

    @property
    def absent(self) -> int:
        """Bytes of registered memory that are not mapped."""
        return sum(region.size - region.present for region in self.regions)


def judge(facts: Facts) -> Judged:
    """What is to be thought of it."""
    if not facts.regions:
        return "full", "It needs no pager: none of its memory is registered with a userfaultfd.", None
    if facts.search.holders:
        return _held(facts)
    if facts.itself:
        if facts.hanging:
            return "stalls", f"It serves its memory itself, and {facts.hanging}.", "look at the VMM's own log"
        return "served", "It serves its memory itself.", None
    return _alone(facts)


def _held(facts: Facts) -> Judged:
    """Somebody else holds its userfaultfd."""
    holders = {holder.process.pid: holder for holder in facts.search.holders}
    who = " and ".join(str(holder.process) for holder in holders.values())
    if all(_is_stopped(holder) for holder in holders.values()):
        todo = f"let it run again: kill -CONT {' '.join(map(str, holders))}"
        if facts.hanging:
            return "hangs", f"It hangs: its pager, {who}, is stopped, and {facts.hanging}.", todo
        return "unserved", f"Its pager, {who}, is stopped: it will hang at its next fault.", todo
    if facts.hanging and facts.unread:
        return "hangs", f"It hangs: {who} holds its userfaultfd and does not read it; {facts.hanging}.", f"see what {who} does"
    if facts.hanging:
        todo = f"the log of {who} says why: look for `stall`, `failed` or `no-memory`"
        return "stalls", f"It stands still: {who} has read its faults and brings no page; {facts.hanging}.", todo
    return "served", f"It is served by {who}.", None


def _alone(facts: Facts) -> Judged:
    """Nobody else was seen to hold its userfaultfd."""
    if not facts.descriptors:
        if facts.hanging:
            todo = "look for its pager by name; if it has none, end it and restore it anew"
            return "hangs", f"It hangs: {facts.hanging}, and it keeps no userfaultfd by which its pager could be found.", todo
        return (
            "unseen",
            "It keeps no userfaultfd, so that its pager cannot be found. Should that end, absent pages would read as zero.",
            "look for its pager by name; a VMM should keep its userfaultfd open",
        )
    if facts.enclosed:
        nobody = "nobody inside this container serves it. A pager outside of it does not show"
        if facts.hanging:
            return "hangs", f"It hangs: {facts.hanging}, and {nobody}.", f"before anything else, {LOOK_FROM_OUTSIDE}"
        return "unseen", f"Nothing waits at the moment, but {nobody}.", LOOK_FROM_OUTSIDE
    unseen = facts.search.unseen
    # A /proc that hides processes leaves nobody to be counted as unseen.
    if not has_capability(CAP_SYS_PTRACE):
        todo = "run this as root, to see who serves it"
        if facts.hanging:
            return "hangs", f"It hangs: {facts.hanging}, and nobody that can be seen from here serves it.", todo
        return "unseen", "Nothing waits at the moment, but nobody that can be seen from here serves it.", todo
    # With every right, what stays unseen is rare (a process with yet more rights), and said.
    nobody = "no other process holds its userfaultfd"
    nobody += f" ({unseen_processes(unseen)} could not be looked into)" if unseen else ""
    todo = f"if {unseen_processes(unseen)} is no pager, {END_IT}" if unseen else END_IT
    if facts.hanging:
        return "hangs", f"It hangs: {facts.hanging}, and nobody serves it: {nobody}.", todo
    if facts.absent:
        said = f"{format_size(facts.absent)} of its memory is not there, and the next touch of that will wait for ever"
    else:
        said = "It has all of its memory, but its next discard (a balloon's, say) will wait for ever"
    return "unserved", f"Nobody serves it: {nobody}. {said}.", todo


def unseen_processes(unseen: tuple[proc.Status, ...]) -> str:
    """Those that could not be looked into, in words."""
    return " and ".join(map(str, unseen)) if len(unseen) <= 2 else f"{len(unseen)} processes of other users"


def _is_stopped(holder: Holder) -> bool:
    return holder.process.state in ("T", "t")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
