"""Peers that say the wrong thing, or nothing: each is refused with a line that says why, and harms nobody."""

import errno
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from actors.memory_file import PAGE, first_byte
from actors.peer import Peer
from actors.serve import Serve

pytestmark = pytest.mark.needs("/dev/userfaultfd")

SIZE = 256 * PAGE


@pytest.fixture
def pager(serve: Callable[..., Serve], peer: Callable[[], Peer]) -> Iterator[Serve]:
    """A pager with a VM that lives through whatever the others do; afterwards nothing of the others is left."""
    pager = serve("--handshake-timeout", "60")
    good = peer()
    good.map(SIZE)
    good.connect(pager.socket)
    good.say(json.dumps(good.firecracker()), "userfaultfd")
    assert good.read(3) == first_byte(3)
    before = pager.descriptors()
    yield pager
    assert good.read(200) == first_byte(200)
    assert pager.child.poll() is None
    # What a refused peer had sent is closed once it is dead; `refused` is told before, so wait for the death itself.
    wait_until_equal(pager, before)


def wait_until_equal(pager: Serve, before: dict[str, str]) -> None:
    """Descriptors come and go on the pager's threads: probes that are refused after others tell that those are done."""
    for _ in range(200):
        if sorted(pager.descriptors().values()) == sorted(before.values()):
            return
        with Peer() as probe:
            probe.connect(pager.socket)
            probe.say("x")
            pager.event("refused", pid=probe.pid)
    assert sorted(pager.descriptors().values()) == sorted(before.values())


def refused(pager: Serve, peer: Peer, says: str) -> dict[str, Any]:
    event = pager.event("refused", pid=peer.pid)
    assert says in event["reason"], event
    return event


BODIES = {
    "no JSON": ("GET / HTTP/1.1\r\n\r\n", "no JSON"),
    "broken JSON": ('[{"base_host_virt_addr": 1,,}]', "handshake"),
    "neither array nor object": ('"hello"', "no JSON array"),
    "an empty array": ("[]", "region"),
    "not regions": ("[1, 2]", "handshake"),
    "a number too large": ('[{"base_host_virt_addr": 1e99, "size": 4096, "offset": 0}]', "handshake"),
    "deep": ("[" * 5000, "deep"),
    "huge": ("[" + " " * (2 << 20), "longer than"),
    "version 2": (
        '{"version": 2, "delivery": "uffd", "vcpus": 1, "descriptors": ["userfaultfd"], "regions": []}',
        "version",
    ),
    "an unknown key": ('{"version": 1, "colour": "red"}', "colour"),
}


@pytest.mark.parametrize("case", BODIES)
def test_what_is_no_handshake_is_refused_with_the_reason(pager: Serve, peer: Callable[[], Peer], case: str) -> None:
    body, says = BODIES[case]
    stranger = peer()
    stranger.connect(pager.socket)
    stranger.say(body)
    assert refused(pager, stranger, says)["action"] == "none"
    stranger.hung_up()


REGIONS: dict[str, tuple[list[tuple[int, int, int]], str]] = {
    "overlapping": ([(0, SIZE // 2, 0), (SIZE // 4, SIZE // 2, SIZE // 2)], "share host-virtual"),
    "overlapping in the snapshot": ([(0, SIZE // 2, 0), (SIZE // 2, SIZE // 2, SIZE // 4)], "share snapshot offsets"),
    "unaligned address": ([(1, SIZE, 0)], "not a multiple of its page size"),
    "unaligned size": ([(0, SIZE - 1, 0)], "not a multiple of its page size"),
    "unaligned offset": ([(0, SIZE, 100)], "not a multiple of its page size"),
    "zero-sized": ([(0, 0, 0)], "size"),
    "wrapping": ([(0, (1 << 64) - PAGE, 0)], "past the end"),
}


@pytest.mark.parametrize("case", REGIONS)
def test_regions_that_cannot_be_are_refused_and_the_peer_does_not_hang(pager: Serve, peer: Callable[[], Peer], case: str) -> None:
    regions, says = REGIONS[case]
    stranger = peer()
    stranger.map(SIZE)
    stranger.touch(0)
    stranger.connect(pager.socket)
    body = [
        {"base_host_virt_addr": stranger.hva + at, "size": size, "offset": offset, "page_size": PAGE}
        for at, size, offset in regions
    ]
    stranger.say(json.dumps(body), "userfaultfd")
    assert refused(pager, stranger, says)["action"] == "killed"
    assert stranger.finish() == -9
    assert not [line for line in stranger.lines if line["did"] == "touched"], "a silent zero page"


@pytest.mark.parametrize(
    ("descriptors", "says"),
    [
        ((), "without a descriptor"),
        (("other",), "no userfaultfd"),
        (("userfaultfd", "other"), "2 descriptors"),
        (("other",) * 100, "descriptors"),
    ],
    ids=["none", "not a userfaultfd", "too many", "far too many"],
)
def test_the_wrong_descriptors_are_refused(
    pager: Serve, peer: Callable[[], Peer], descriptors: tuple[str, ...], says: str
) -> None:
    stranger = peer()
    stranger.map(SIZE)
    stranger.connect(pager.socket)
    stranger.say(json.dumps(stranger.firecracker()), *descriptors)
    if not descriptors:
        stranger.ask("end_of_message")
    refused(pager, stranger, says)
    if "userfaultfd" in descriptors:
        assert stranger.finish() == -9
    else:
        stranger.hung_up()


def test_memory_that_could_shrink_is_refused(pager: Serve, peer: Callable[[], Peer]) -> None:
    stranger = peer()
    stranger.map(SIZE, "unsealed")
    stranger.connect(pager.socket)
    body = {
        "version": 1,
        "delivery": "uffd",
        "vcpus": 1,
        "name": "shrinker",
        "descriptors": ["userfaultfd", "memory"],
        "regions": [{"hva": stranger.hva, "size": SIZE, "offset": 0, "page_size": PAGE}],
    }
    stranger.say(json.dumps(body), "userfaultfd", "memory")
    refused(pager, stranger, "can still be shrunk")
    assert stranger.finish() == -9


def test_a_peer_that_says_nothing_is_refused_in_time(serve: Callable[..., Serve], peer: Callable[[], Peer]) -> None:
    pager, silent, half = serve("--handshake-timeout", "0.2"), peer(), peer()
    silent.connect(pager.socket)
    refused(pager, silent, "no whole handshake in time")
    silent.hung_up()
    half.map(SIZE)
    half.connect(pager.socket)
    half.say("[", "userfaultfd")
    refused(pager, half, "no whole handshake in time")
    assert half.finish() == -9


def test_a_peer_that_leaves_at_once_is_told_of(pager: Serve, peer: Callable[[], Peer]) -> None:
    stranger = peer()
    stranger.connect(pager.socket)
    stranger.child.kill()
    stranger.finish()
    refused(pager, stranger, "without a handshake")


@pytest.mark.needs_root
def test_a_peer_of_another_user_is_refused(serve: Callable[..., Serve], peer: Callable[..., Peer]) -> None:
    pager = serve("--allow-uid", "0", "--mode", "0666")
    pager.socket.parent.chmod(0o755)
    stranger, friend = peer(), peer()
    for each in (stranger, friend):
        each.map(SIZE)
    stranger.ask("become", uid=65534)
    stranger.introduce(pager.socket)
    event = refused(pager, stranger, "uid 65534")
    assert event["uid"] == 65534
    if event["action"] == "killed":
        assert stranger.finish() == -9
    else:  # it was refused before it could send its userfaultfd: it knows
        assert stranger.wait_for(lambda line: line["did"] == "say")["error"] == errno.EPIPE
    friend.introduce(pager.socket)
    assert friend.read(7) == first_byte(7)


def test_handshakes_in_parts_and_of_every_version_are_taken(pager: Serve, peer: Callable[[], Peer]) -> None:
    bodies: list[dict[str, Any]] = [
        {},
        {"page_size_kib": PAGE},
        {"page_size": PAGE, "page_size_kib": PAGE},
        {"page_size": PAGE, "gpa_start": 0, "is_guest_memfd": False, "padding": "x" * 100_000},
    ]
    for extra in bodies:
        vm = peer()
        vm.map(SIZE)
        vm.connect(pager.socket)
        body = json.dumps([{"base_host_virt_addr": vm.hva, "size": SIZE, "offset": 0, **extra}])
        vm.say(body[:10])
        vm.say(body[10:20], "userfaultfd")
        vm.say(body[20:])
        started = pager.event("session-started", pid=vm.pid)
        assert (started["form"], started["size"]) == ("firecracker", SIZE)
        assert [vm.read(page) for page in (0, 15, 128)] == [first_byte(page) for page in (0, 15, 128)]
        vm.child.kill()
        pager.event("ended", vm=started["vm"])
