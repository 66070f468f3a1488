"""One VM being served, by each kind of memory: right contents, zero after a discard, and let go when it is full."""

from collections.abc import Callable

import pytest

from actors.memory_file import PAGE, first_byte
from actors.peer import Peer
from actors.serve import Serve

pytestmark = pytest.mark.needs("/dev/userfaultfd")

SIZE = 256 * PAGE
SNAPSHOT = [first_byte(page) for page in range(256)]
KINDS = [("firecracker", "anonymous"), ("latepage", "anonymous"), ("latepage", "private"), ("latepage", "shared")]
kinds = pytest.mark.parametrize(("form", "backing"), KINDS, ids=[f"{form}-{backing}" for form, backing in KINDS])
populate = pytest.mark.parametrize("populate", ["none", "background"])


@kinds
@populate
def test_every_page_is_the_snapshots(
    serve: Callable[..., Serve], peer: Callable[[], Peer], form: str, backing: str, populate: str
) -> None:
    pager, vm = serve("--populate", populate), peer()
    vm.map(SIZE, backing)
    name = vm.introduce(pager.socket, form=form)
    started = pager.event("session-started", vm=name)
    assert (started["form"], started["backing"], started["size"]) == (form, backing, SIZE)
    assert vm.read_all() == SNAPSHOT
    pager.event("populated", vm=name)
    vm.child.kill()
    ended = pager.event("ended", vm=name)
    assert ended["lacking"] == 0


@kinds
@populate
def test_a_discarded_page_reads_as_zero_and_never_as_the_snapshot(
    serve: Callable[..., Serve], peer: Callable[[], Peer], form: str, backing: str, populate: str
) -> None:
    pager, vm = serve("--populate", populate), peer()
    vm.map(SIZE, backing)
    name = vm.introduce(pager.socket, form=form)
    vm.read(0)
    vm.discard(0, 8)  # touched, and not touched yet
    vm.discard(100, 50)
    expected = [0 if page < 8 or 100 <= page < 150 else first_byte(page) for page in range(256)]
    assert vm.read_all() == expected
    for _ in range(20):
        vm.discard(200, 1)
        assert vm.read(200) == 0
    assert pager.seen("failed") == []
    assert vm.read_all() == [0 if page == 200 else byte for page, byte in enumerate(expected)]
    vm.child.kill()
    pager.event("ended", vm=name)


@pytest.mark.parametrize("form", ["firecracker", "latepage"])
def test_a_full_vm_is_let_go_and_needs_no_pager_any_more(
    serve: Callable[..., Serve], peer: Callable[[], Peer], form: str
) -> None:
    pager, vm = serve("--populate", "background", "--detach-when-full"), peer()
    vm.map(SIZE)
    name = vm.introduce(pager.socket, form=form)
    pager.event("detached", vm=name)
    pager.child.kill()
    pager.finish()
    assert vm.read_all() == SNAPSHOT
    vm.discard(0, 16)  # would hang for ever, were its memory still registered
    assert vm.read(0) == 0


def test_private_memory_is_never_let_go_while_its_vm_lives(serve: Callable[..., Serve], peer: Callable[[], Peer]) -> None:
    pager, vm = serve("--populate", "background", "--detach-when-full"), peer()
    vm.map(SIZE, "private")
    name = vm.introduce(pager.socket, form="latepage")
    pager.event("populated", vm=name)
    vm.discard(5)
    assert vm.read(5) == 0
    vm.child.kill()
    pager.event("ended", vm=name)
    assert pager.seen("detached") == []


def test_a_vm_that_is_killed_leaves_nothing_in_the_pager(serve: Callable[..., Serve], peer: Callable[[], Peer]) -> None:
    pager = serve()
    first = peer()
    first.map(SIZE, "shared")
    name = first.introduce(pager.socket, form="latepage")
    first.read(0)
    before = sorted(pager.descriptors().values()), pager.threads(), len(pager.mappings())
    for _ in range(5):
        vm = peer()
        vm.map(SIZE, "shared")
        second = vm.introduce(pager.socket, form="latepage")
        vm.read(7)
        vm.child.kill()
        pager.event("ended", vm=second)
        assert (sorted(pager.descriptors().values()), pager.threads(), len(pager.mappings())) == before
    first.child.kill()
    pager.event("ended", vm=name)
    assert pager.mappings() == []


def test_two_vms_of_one_name_can_be_told_apart(serve: Callable[..., Serve], peer: Callable[[], Peer]) -> None:
    pager, vms = serve(), [peer(), peer()]
    names = set()
    for vm in vms:
        vm.map(SIZE)
        vm.introduce(pager.socket, form="latepage", name="twin")
        names.add(pager.event("session-started", pid=vm.pid)["vm"])
    assert len(names) == 2
