"""Memory files that cannot be served, that fit no VM, or that change while they are served."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.memory_file import PAGE, first_byte
from actors.peer import Peer
from actors.serve import Serve

uffd = pytest.mark.needs("/dev/userfaultfd")


def test_a_missing_memory_file_stops_the_start(serve: Callable[..., Serve], folder: Path) -> None:
    pager = serve(source=folder / "none.mem", listens=False)
    assert pager.finish() == 1
    assert "none.mem" in pager.said()
    assert "no such file" in pager.said()
    assert not (folder / "pager.sock").exists()


def test_an_empty_memory_file_stops_the_start(serve: Callable[..., Serve], folder: Path) -> None:
    (folder / "empty.mem").touch()
    pager = serve(source=folder / "empty.mem", listens=False)
    assert pager.finish() == 1
    assert "empty" in pager.said()


def test_a_memory_file_that_may_not_be_read_stops_the_start(serve: Callable[..., Serve], folder: Path) -> None:
    # A folder cannot be read as a file by anyone, root included.
    (folder / "folder.mem").mkdir()
    pager = serve(source=folder / "folder.mem", listens=False)
    assert pager.finish() == 1
    assert "folder.mem" in pager.said()


@uffd
@pytest.mark.parametrize("pages", [255, 257])
def test_a_vm_that_is_smaller_or_larger_is_refused_with_both_sizes_and_others_go_on(
    serve: Callable[..., Serve], peer: Callable[[], Peer], pages: int
) -> None:
    pager, wrong, right = serve(), peer(), peer()
    wrong.map(pages * PAGE)
    wrong.connect(pager.socket)
    wrong.say(json.dumps(wrong.firecracker()), "userfaultfd")
    refused = pager.event("refused", pid=wrong.pid)
    assert str(256 * PAGE) in refused["reason"]
    assert str(pages * PAGE) in refused["reason"]
    assert wrong.finish() == -9, "its faults would have waited for ever"
    right.map(256 * PAGE)
    right.connect(pager.socket)
    right.say(json.dumps(right.firecracker()), "userfaultfd")
    assert [right.read(page) for page in (0, 15, 255)] == [first_byte(page) for page in (0, 15, 255)]


@uffd
def test_a_page_that_was_truncated_away_fails_closed_and_the_pager_lives(
    serve: Callable[..., Serve], peer: Callable[[], Peer], memory_file: Path
) -> None:
    # A writer who was there first: no lease is granted, and nothing holds him back.
    with memory_file.open("r+b") as writer:
        pager, victim = serve("--fault-around", "4KiB"), peer()
        victim.map(256 * PAGE)
        victim.connect(pager.socket)
        victim.say(json.dumps(victim.firecracker()), "userfaultfd")
        assert victim.read(0) == first_byte(0)
        writer.truncate(128 * PAGE)
        victim.touch(200)
        failed = pager.event("failed", vm=f"vm-{victim.pid}")
        assert failed["address"] == victim.hva + 200 * PAGE
        assert failed["action"] == "killed"
        assert victim.finish() == -9
        assert not [line for line in victim.lines if line["did"] == "touched" and line["page"] == 200], "no zero page"
        pager.event("ended", vm=f"vm-{victim.pid}")
        assert pager.child.poll() is None


@uffd
def test_a_memory_file_that_is_written_without_a_lease_is_reported(
    serve: Callable[..., Serve], peer: Callable[[], Peer], memory_file: Path
) -> None:
    with memory_file.open("r+b") as writer:
        pager = serve()
        writer.write(b"changed")
        writer.flush()
        changed = pager.event("source-changed")
        assert str(memory_file) in changed["source"] + changed["change"]
        late = peer()
        late.map(256 * PAGE)
        late.connect(pager.socket)
        late.say(json.dumps(late.firecracker()), "userfaultfd")
        assert "modified" in pager.event("refused", pid=late.pid)["reason"]


@uffd
def test_a_writer_is_held_back_until_the_vms_are_full(
    serve: Callable[..., Serve], peer: Callable[[], Peer], memory_file: Path
) -> None:
    pager, vm = serve(), peer()
    vm.map(256 * PAGE)
    vm.connect(pager.socket)
    vm.say(json.dumps(vm.firecracker()), "userfaultfd")
    assert vm.read(0) == first_byte(0)
    if pager.seen("source-changed") or "no read lease" in json.dumps(pager.lines):
        pytest.skip("no read lease is granted here")
    with memory_file.open("r+b") as writer:  # blocks until the lease is let go
        pager.event("lease-breaking")
        pager.event("populated", vm=f"vm-{vm.pid}")
        writer.write(b"x" * 256 * PAGE)
    assert [vm.read(page) for page in range(256)] == [first_byte(page) for page in range(256)]


@uffd
def test_a_page_that_cannot_be_had_is_poisoned_where_that_is_the_policy(
    serve: Callable[..., Serve], peer: Callable[[], Peer], memory_file: Path
) -> None:
    with memory_file.open("r+b") as writer:
        pager, vm = serve("--fault-around", "4KiB", "--on-missing", "poison"), peer()
        if "UFFDIO_POISON" in pager.said():
            pytest.skip("this kernel has no UFFDIO_POISON")
        vm.map(256 * PAGE)
        name = vm.introduce(pager.socket)
        pager.event("session-started", vm=name)
        writer.truncate(128 * PAGE)
        vm.touch(200)
        assert pager.event("failed", vm=name)["action"] == "poisoned"
        assert vm.touched(200)["error"] == errno.EFAULT
        assert vm.read(0) == first_byte(0), "the VM lives, and its other pages are served"
