"""`latepage.firecracker.restore` and `latepage restore` with a real Firecracker, jailed and not."""

import asyncio
import gc
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from actors.firecracker_vm import (
    MIB,
    QUIET,
    SPELL,
    FirecrackerVm,
    RestoredGuest,
    Snapshot,
    find_program,
    is_static,
    seccomp_modes,
)
from actors.lines import LineProcess
from latepage import Policy
from latepage.firecracker import Client, FirecrackerError, Jailer, Owner, restore, restoring


def held() -> tuple[int, int]:
    """Descriptors and threads of this process. A pager that is closed keeps a few until nobody refers to it."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_restored_vm_has_its_memory_and_its_end_leaves_nothing(firecracker: Path, snapshot: Snapshot) -> None:
    before = held()
    with restore(snapshot.state, snapshot.memory, firecracker=firecracker, arguments=QUIET) as restored:
        vm = restored.vm
        guest = RestoredGuest(vm)
        assert list(vm.steps) == ["start", "load", "resume"]
        assert guest.verify("random")["pages"] == snapshot.pages
        guest.balloon(8 * MIB)
        assert guest.balloon(0)["not_zero"] == 0
        assert guest.verify("sequential")["pages"] == snapshot.pages
        session = restored.session(vm)
        assert session is not None
        assert session.stats.counters["removed_pages"] == 8 * MIB >> 12
        folder = vm.api_sock.parent
    assert is_gone(vm.pid)
    assert not folder.exists()
    del restored, vm, guest, session
    assert held() == before


def test_eight_clones_are_restored_by_one_call(firecracker: Path, snapshot: Snapshot) -> None:
    policy = Policy(populate="background")
    options = {"firecracker": firecracker, "arguments": QUIET, "policy": policy, "clones": 8}
    with restore(snapshot.state, snapshot.memory, **options) as restored:
        guests = [RestoredGuest(vm) for vm in restored.vms]
        for guest in guests:
            assert guest.ask("change", "changed")["wrong"] == 0
        for guest in guests:
            assert guest.verify()["pages"] == snapshot.pages
        pids = [vm.pid for vm in restored.vms]
    assert len(set(pids)) == 8
    assert all(map(is_gone, pids))


def test_an_event_loop_restores_as_well(firecracker: Path, snapshot: Snapshot) -> None:
    async def run() -> None:
        async with restoring(snapshot.state, snapshot.memory, firecracker=firecracker, arguments=QUIET) as restored:
            found = await asyncio.to_thread(RestoredGuest(restored.vm).verify)
            assert found["pages"] == snapshot.pages
            async with restored.vm.async_client() as api:
                assert (await api.info()).state == "Running"

    asyncio.run(run())


def test_what_firecracker_says_of_a_damaged_state_file_is_passed_on_and_nothing_is_left(
    firecracker: Path, snapshot: Snapshot, folder: Path
) -> None:
    damaged = folder / "damaged.state"
    contents = bytearray(snapshot.state.read_bytes())
    contents[len(contents) // 2] ^= 1
    damaged.write_bytes(contents)
    before = held()
    with pytest.raises(FirecrackerError, match=r"(?s)Firecracker: .*(CRC|checksum|snapshot)") as caught:
        restore(damaged, snapshot.memory, firecracker=firecracker, arguments=QUIET)
    assert caught.value.fault_message
    del caught
    assert held() == before


@pytest.mark.needs_root
def test_a_jailed_vm_is_served_in_its_jail_under_the_filters_and_with_its_balloon(
    firecracker: Path, snapshot: Snapshot, folder: Path
) -> None:
    program, why = find_program("jailer", "JAILER", beside=firecracker)
    if program is None:
        pytest.skip(why)
    if not is_static(firecracker):
        pytest.skip("this firecracker is linked dynamically, and a jail has no libraries")
    before = held()
    owner = Owner(65534, 65534)
    jailer = Jailer(program=program, owner=owner, chroot_base=folder, id="test")
    with restore(snapshot.state, snapshot.memory, firecracker=firecracker, jailer=jailer, arguments=QUIET) as restored:
        vm = restored.vm
        status = Path(f"/proc/{vm.pid}/status").read_text()
        assert "Uid:\t65534\t65534\t65534\t65534" in status
        assert vm.jail is not None
        assert "2" in seccomp_modes(vm.pid).values()
        guest = RestoredGuest(vm)
        assert guest.verify("random")["pages"] == snapshot.pages
        guest.balloon(4 * MIB)
        assert guest.balloon(0)["not_zero"] == 0
        assert guest.verify("sequential")["pages"] == snapshot.pages
    assert is_gone(vm.pid)
    assert list(folder.iterdir()) == []
    del restored, vm, guest
    assert held() == before


class Console:
    """A FIFO that a VM's standard output goes to, and its lines as they come."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        # Both ends, so that it is never at its end while nobody writes.
        self._fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._came = b""

    def line(self, event: str) -> dict[str, object]:
        """The next line of the guest's with that event."""
        deadline = time.monotonic() + SPELL
        while True:
            line, newline, rest = self._came.partition(b"\n")
            if newline:
                self._came = rest
                if line.startswith(b'{"event":"' + event.encode() + b'"'):
                    found: dict[str, object] = json.loads(line)
                    return found
            elif select.select([self._fifo], [], [], max(0, deadline - time.monotonic()))[0]:
                self._came += os.read(self._fifo, 1 << 16)
            else:
                raise AssertionError(f"no line {event} came; {self._came!r}")

    def close(self) -> None:
        os.close(self._fifo)


def test_the_command_restores_stays_as_the_pager_and_lets_its_vm_go_on_without_it(
    firecracker: Path, guest: Path, start_vm: Callable[[], FirecrackerVm], folder: Path
) -> None:
    with start_vm() as vm:
        vm.boot(guest, 32 * MIB, "loop")
        vm.save(folder / "loop.state", folder / "loop.mem")
    console = Console(folder / "console")
    command: list[str | Path] = [sys.executable, "-m", "latepage", "restore", "--json", "--console", folder / "console"]
    command += ["--state", folder / "loop.state", "--memory", folder / "loop.mem", "--api-sock", folder / "restored.api"]
    command += ["--firecracker", firecracker, "--firecracker-arg=--level", "--firecracker-arg=Error"]
    with ExitStack() as stack:
        stack.callback(console.close)
        latepage = stack.enter_context(LineProcess(command))
        pidfd = os.pidfd_open(latepage.event("running")["vms"][0]["pid"])
        stack.callback(os.close, pidfd)
        # Once it runs it is nobody's child but its own.
        stack.callback(select.select, [pidfd], [], [])
        stack.callback(signal.pidfd_send_signal, pidfd, signal.SIGKILL)
        assert [line["step"] for line in latepage.seen("step")] == ["prepare", "start", "load", "resume"]
        for event in ("changed", "verified", "verified"):
            assert console.line(event)["wrong"] == 0
        latepage.signal(signal.SIGTERM)
        assert latepage.finish() == 0
        for event in ("changed", "verified", "verified"):
            assert console.line(event)["wrong"] == 0
        with Client(folder / "restored.api") as api:
            assert api.info().state == "Running"
