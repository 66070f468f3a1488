"""The delivery `notify` from Python and on the command line: guests of threads, on any kernel, and what is refused."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.serve import Serve
from latepage import CallbackSource, GuestError, Pager, Policy
from latepage.check import check_host
from latepage.kvm import ConfigError, Job, NotifyReport, Trap, Vm, VmProcess

MEMORY = 8 << 20
ALL = MEMORY // 4096

Snapshot = tuple[Path, Path]
pytestmark = pytest.mark.needs("/dev/userfaultfd")


@pytest.fixture
def snapshot(folder: Path) -> Snapshot:
    """Pages of a seed, and fifty of zeros."""
    files = folder / "vm.state", folder / "vm.mem"
    with Vm.create(memory=MEMORY, split=True, vcpus=4, backing="shared", guest="threads") as vm:
        vm.run(Job("fill", seed=7))
        vm.wait()
        vm.discard(100, 50)
        vm.save(*files)
    return files


def told(vm: Vm) -> NotifyReport:
    report = vm.report().notify
    assert report is not None
    return report


@pytest.mark.parametrize("notify_all", [False, True])
def test_a_pager_in_another_process_is_posted_to(snapshot: Snapshot, serve: Callable[..., Serve], notify_all: bool) -> None:
    pager = serve("--fault-around", "4KiB", source=snapshot[1])
    with Vm.restore(
        snapshot[0], pager=pager.socket, delivery="notify", notify_all=notify_all, guest="threads", name="vm-7"
    ) as vm:
        vm.run(Job("verify", order="random"))
        assert vm.wait().is_right
        assert vm.compare().is_right
        report = vm.report()
        assert report.pager == (str(pager.socket), "latepage")
        notify = told(vm)
        assert (notify.delivery, notify.trap, notify.all, notify.connected) == ("notify", None, notify_all, 1)
        assert (notify.exits, notify.posted, notify.forwarded) == (ALL, ALL, 0)
    assert pager.event("session-started", vm="vm-7")
    if notify_all:
        # There is no userfaultfd that would tell that this very process, and so the memory, may live on.
        assert pager.event("ended", vm="vm-7")


def test_the_command_line_restores_and_tells(snapshot: Snapshot, serve: Callable[..., Serve], folder: Path) -> None:
    pager = serve(source=snapshot[1])
    process = VmProcess.restore(
        snapshot[0],
        Job("verify"),
        pager=pager.socket,
        delivery="notify",
        notify_all=True,
        guest="threads",
        api_sock=folder / "vm.sock",
    )
    with process as vm:
        assert vm.done().is_right
        command = [sys.executable, "-m", "latepage", "vm", "report", str(folder / "vm.sock")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "  notify    signal: " in said
    assert " from userfaultfd), 0 discards" in said


@pytest.mark.parametrize("notify_all", [False, True])
def test_the_next_pager_at_the_socket_serves_what_was_posted_and_fills_nothing_twice(
    snapshot: Snapshot, serve: Callable[..., Serve], notify_all: bool
) -> None:
    pager = serve("--fault-around", "64KiB", source=snapshot[1])
    with Vm.restore(snapshot[0], pager=pager.socket, delivery="notify", notify_all=notify_all, guest="threads") as vm:
        for seed in (8, 9, 10):
            # In every stretch that comes with a fault some pages are the guest's own now.
            first = 10 + 300 * (seed - 8)
            vm.run(Job("dirty", seed=seed, pages=tuple((page, 3) for page in range(first, first + 300, 16))))
            vm.wait()
            pager.child.kill()
            pager.child.wait()
            posted = told(vm).posted
            # The VMM itself writes nothing for this job, or it would wait too. All pages are looked at, absent ones among them.
            vm.run(Job("touch"))
            while told(vm).posted == posted:
                pass
            pager = serve("--fault-around", "64KiB", source=snapshot[1])
            vm.wait()
            vm.run(Job("verify", order="random", seed=seed))
            assert vm.wait().is_right
            vm.discard(first, 5)
        assert vm.compare().is_right
        assert told(vm).connected == 4
        events = [event["event"] for event in iter(lambda: vm.next_event(0), None)]
        assert [event for event in events if event.startswith("pager")] == ["pager_gone", "pager_back"] * 3


@pytest.mark.parametrize("notify_all", [False, True])
def test_a_page_that_cannot_be_had_ends_the_process_and_is_never_zero(snapshot: Snapshot, folder: Path, notify_all: bool) -> None:
    contents = snapshot[1].read_bytes()
    broken = (2 << 20) + 50 * 4096

    def supply(offset: int, length: int) -> bytes:
        if offset <= broken < offset + length:
            raise OSError("it is lost")
        return contents[offset : offset + length]

    source = CallbackSource(supply, size=len(contents), batch=4096)
    with Pager() as pager:
        pager.listen(folder / "pager.sock", source, Policy(on_missing="poison", fault_around=4096))
        way = {"pager": folder / "pager.sock", "delivery": "notify", "notify_all": notify_all}
        with VmProcess.restore(snapshot[0], Job("touch"), guest="threads", **way) as vm:  # type: ignore[arg-type]
            with pytest.raises(GuestError, match=r"the memory at host address 0x[0-9a-f]+ could not be had: its pager cannot"):
                vm.done()
            assert vm.process.returncode == -signal.SIGBUS


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"delivery": "exit"}, "name a memory file as late memory"),
        ({"trap": "bitmap"}, "go with the delivery notify"),
        ({"notify_all": True}, "go with the delivery notify"),
        ({"delivery": "notify", "handshake": "firecracker"}, "carries no channel"),
        ({"delivery": "notify", "send_memory": False}, "always sent"),
        ({"delivery": "notify", "window": 8192}, "goes with late memory"),
        ({"delivery": "notify", "backing": "anonymous", "guest": "threads"}, "cannot be anonymous"),
        ({"delivery": "notify", "trap": "bitmap", "guest": "threads"}, "goes with a guest on KVM"),
    ],
)
def test_what_cannot_be_is_refused(snapshot: Snapshot, options: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Vm.restore(snapshot[0], pager="/nobody", **options)  # type: ignore[arg-type]


def test_notify_without_a_pager_is_refused(snapshot: Snapshot) -> None:
    with pytest.raises(ConfigError, match="takes a pager"):
        Vm.restore(snapshot[0], memory_file=snapshot[1], late=True, delivery="notify")
    with pytest.raises(ConfigError, match="with a pager"):
        Vm.restore(snapshot[0], memory_file=snapshot[1], delivery="notify")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--read", "MEMORY", "--delivery", "notify"], "--delivery and --trap go with --late or --pager only"),
        (["--late", "MEMORY", "--delivery", "notify"], "takes a pager: give its socket (--pager)"),
        (["--late", "MEMORY", "--notify-all"], "--notify-all goes with --pager and --delivery notify only"),
        (["--pager", "/nobody", "--notify-all"], "go with the delivery notify"),
        (["--pager", "/nobody", "--window", "8KiB"], "--window goes with --late only"),
        (["--pager", "/nobody", "--delivery", "exit"], "name a memory file as late memory"),
    ],
)
def test_the_command_line_says_what_goes_with_what(snapshot: Snapshot, flags: list[str], why: str) -> None:
    filled = [str(snapshot[1]) if flag == "MEMORY" else flag for flag in flags]
    command = [sys.executable, "-m", "latepage", "vm", "restore", str(snapshot[0]), *filled]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert why in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_kernel_without_a_trap_is_told_what_it_lacks_before_a_pager_is_asked(snapshot: Snapshot) -> None:
    items = check_host().items
    if items["kvm.vm"].state != "yes":
        pytest.skip("needs KVM")
    kinds: tuple[tuple[Trap, str], ...] = ("bitmap", "kvm.exit_by_userfault"), ("attributes", "kvm.exit_by_attributes")
    for trap, key in kinds:
        if items[key].state == "yes":
            continue
        why = rf"no memory-fault exits: by {trap}: KVM_.*--delivery uffd or --guest threads needs none"
        with pytest.raises(GuestError, match=why):
            Vm.restore(snapshot[0], pager="/nobody", delivery="notify", trap=trap, guest="kvm")
