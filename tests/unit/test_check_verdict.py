"""What is said of a VM follows from what was seen, and from nothing else."""

import pytest

from latepage.check import proc, verdict
from latepage.check.holders import Holder, Search
from latepage.check.proc import Descriptor, Region, Status, Thread
from latepage.check.verdict import Facts, judge

VMM = Status(10, "firecracker", "firecracker --id a", "S", 1000, False)
PAGER = Status(20, "latepage", "latepage serve a.sock guest.mem", "S", 0, False)
STOPPED = Status(20, "latepage", "latepage serve a.sock guest.mem", "T", 0, False)
STRANGER = Status(30, "secret", "secret", "S", 0, False)
HALF = Region(1 << 30, 2 << 20, 1 << 20, 4096, ("missing",), "")
WHOLE = Region(1 << 30, 2 << 20, 2 << 20, 4096, ("missing",), "")
FAULT, DISCARD = Thread(11, "vcpu-0", "page", 5), Thread(10, "firecracker", "event", 7)


def facts(
    *,
    regions: tuple[Region, ...] = (HALF,),
    holders: tuple[Status, ...] = (),
    unseen: tuple[Status, ...] = (),
    descriptors: tuple[Descriptor, ...] = (Descriptor(5, 1, 0, 0, 8),),
    itself: bool = False,
    stuck: tuple[Thread, ...] = (),
    lasting: int = 0,
    enclosed: bool = False,
) -> Facts:
    search = Search(tuple(Holder(holder, 9, 5, False) for holder in holders), unseen, "kcmp")
    return Facts(VMM, descriptors, regions, search, itself, stuck, lasting, 1.04, enclosed)


UNREAD = (Descriptor(5, 1, 1, 1, 8),)
READ = (Descriptor(5, 1, 0, 1, 8),)


@pytest.mark.parametrize(
    ("seen", "word", "says"),
    [
        (facts(regions=()), "full", "needs no pager"),
        (facts(holders=(PAGER,)), "served", "served by process 20 (latepage serve)"),
        (facts(holders=(PAGER,), stuck=(FAULT,), descriptors=UNREAD), "hangs", "does not read it; 1 fault has waited"),
        (facts(holders=(PAGER,), stuck=(FAULT,), descriptors=READ), "stalls", "brings no page; 1 fault has waited"),
        (facts(holders=(STOPPED,)), "unserved", "is stopped: it will hang"),
        (facts(holders=(STOPPED,), stuck=(FAULT, DISCARD)), "hangs", "stopped, and 1 fault and 1 discard have waited"),
        (facts(holders=(STOPPED, PAGER)), "served", "process 20"),
        (facts(itself=True), "served", "itself"),
        (facts(itself=True, stuck=(FAULT,)), "stalls", "itself"),
        (facts(), "unserved", "1 MiB of its memory is not there"),
        (facts(regions=(WHOLE,)), "unserved", "next discard"),
        (facts(stuck=(DISCARD,)), "hangs", "1 discard has waited for at least 1.0 s, and nobody serves it"),
        (facts(lasting=3), "hangs", "3 faults have waited"),
        (facts(descriptors=()), "unseen", "read as zero"),
        (facts(descriptors=(), stuck=(FAULT,)), "hangs", "keeps no userfaultfd"),
    ],
)
def test_a_verdict_follows_from_what_was_seen(seen: Facts, word: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "has_capability", lambda _: True)
    said = judge(seen)
    assert said[0] == word
    assert says in said[1]
    assert (said[2] is None) == (word in ("served", "full")), "whoever is not well is told what to do"


@pytest.mark.parametrize(("may_look", "word"), [(True, "unserved"), (False, "unseen")])
def test_whoever_may_not_look_everywhere_does_not_say_that_nobody_is_there(
    may_look: bool, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "has_capability", lambda _: may_look)
    said = judge(facts(unseen=(STRANGER,)))
    assert said[0] == word
    assert may_look == ("process 30 (secret)" in said[1])
    assert may_look == ("if process 30 (secret) is no pager, end it" in (said[2] or ""))


@pytest.mark.parametrize(
    ("seen", "word"),
    [
        (facts(enclosed=True), "unseen"),
        (facts(enclosed=True, regions=(WHOLE,)), "unseen"),
        (facts(enclosed=True, unseen=(STRANGER,)), "unseen"),
        (facts(enclosed=True, stuck=(FAULT,), descriptors=UNREAD), "hangs"),
    ],
)
def test_in_a_container_a_vm_is_never_to_be_ended_for_want_of_a_pager_that_may_be_outside(
    seen: Facts, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "has_capability", lambda _: True)
    said = judge(seen)
    assert said[0] == word
    assert "outside of it does not show" in said[1]
    assert "look from the host" in (said[2] or "")
    assert "end it" not in (said[2] or "")


def test_a_pager_that_shows_in_a_container_is_a_pager() -> None:
    assert judge(facts(enclosed=True, holders=(PAGER,)))[0] == "served"


def test_whoever_may_not_look_into_others_and_sees_none_does_not_say_that_nobody_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verdict, "has_capability", lambda _: False)
    assert judge(facts(unseen=()))[0] == "unseen"


def test_a_fault_that_hangs_is_said_to_whoever_may_look_only_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "has_capability", lambda _: False)
    said = judge(facts(unseen=(STRANGER,), stuck=(FAULT,)))
    assert said[0] == "hangs"
    assert "root" in (said[2] or "")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("/venv/bin/python -m latepage serve a b", "process 7 (latepage serve)"),
        ("/venv/bin/python3.11 /venv/bin/latepage serve a b", "process 7 (latepage serve)"),
        ("/usr/bin/firecracker --id a", "process 7 (firecracker)"),
        ("python -c pass", "process 7 (python)"),
        ("python", "process 7 (python)"),
    ],
)
def test_a_process_goes_by_the_name_of_its_program(command: str, shown: str) -> None:
    assert str(proc.Status(7, "x", command, "S", 0, False)) == shown
