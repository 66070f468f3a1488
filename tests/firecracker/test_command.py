"""`latepage restore` with real Firecracker: the newcomer's one command, and what becomes of the VMs when it ends."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from actors.firecracker_vm import SPELL, Snapshot
from actors.huge_pages import huge_pages
from actors.restore import Restore
from latepage.firecracker import Client
from latepage.reach import READ, WRITE, Owner, obstacle

Start = Callable[..., Restore]


@pytest.fixture
def start(folder: Path, firecracker: Path, snapshot: Snapshot) -> Iterator[Start]:
    """Starts the command as a user would: Firecracker is on PATH. Its VMs end with the test."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "firecracker").symlink_to(firecracker)
    # A VM that was let go keeps its socket, where private folders are made.
    (folder / "run").mkdir()
    (folder / "run").chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "XDG_RUNTIME_DIR"}
    environment |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "TMPDIR": str(folder / "run")}
    processes: list[Restore] = []
    with ExitStack() as stack:

        def run(*more: str | Path, state: Path = snapshot.state, memory: Path = snapshot.memory) -> Restore:
            flags = ("--state", state, "--memory", memory, *more)
            processes.append(stack.enter_context(Restore(folder, *flags, env=environment)))
            return processes[-1]

        yield run
        for process in processes:
            for pid in {line["pid"] for line in process.lines if line.get("event") == "step" and line["pid"]}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_state_and_memory_are_all_that_it_needs(start: Start) -> None:
    restore = start()
    (vm,) = restore.event("running", SPELL)["vms"]
    assert set(vm["steps"]) == {"start", "load", "resume"}
    with Client(vm["api_sock"]) as client:
        assert client.info().state == "Running"
        assert str(client.version()) == vm["firecracker"]


def test_vms_that_were_let_go_are_whole_and_live_on(start: Start, folder: Path, snapshot: Snapshot) -> None:
    restore = start("--clones", "2")
    vms = restore.event("running", SPELL)["vms"]
    restore.signal(signal.SIGTERM)
    assert restore.finish(SPELL) == 0
    for number, vm in enumerate(vms):
        with Client(vm["api_sock"], timeout=SPELL) as client:
            # Each call is logged to a standard output that nobody reads any more.
            for _ in range(3000):
                assert client.info().state == "Running"
            client.pause()
            # A full snapshot reads every page of a guest that has no pager any more.
            saved = folder / f"saved-{number}.state", folder / f"saved-{number}.mem"
            client.create_snapshot(*saved)
            assert saved[1].stat().st_size == snapshot.memory.stat().st_size


def test_a_state_file_of_another_version_gets_firecrackers_words_and_ours_above_them(
    start: Start, folder: Path, snapshot: Snapshot
) -> None:
    older = folder / "older.state"
    older.write_bytes(bytes.fromhex("0000648684191007") + (5).to_bytes(8, "little") + b"5.0.0" + bytes(500))
    restore = start(state=older)
    assert restore.finish(SPELL) == 1
    said = restore.said()
    ours = said.index("was written in format 5.0.0 (Firecracker 1.11)")
    assert ours < said.index("Firecracker: Load snapshot error: ")
    assert said.startswith("latepage: ")
    assert restore.seen("running") == []


@pytest.mark.parametrize(
    ("flags", "ours"),
    [(("--network", "eth0=tap7"), "no network interface of that name"), (("--vsock", "vm.vsock"), "no vsock device")],
    ids=["network", "vsock"],
)
def test_a_device_that_the_snapshot_does_not_have_is_not_told_as_a_damaged_file(
    start: Start, flags: tuple[str, ...], ours: str
) -> None:
    restore = start(*flags)
    assert restore.finish(SPELL) == 1
    said = restore.said()
    if "use that or a later one" in said:
        pytest.skip(f"this Firecracker is too old for it: {said}")
    assert said.index(ours) < said.index("Firecracker: Load snapshot error: ")
    assert "damaged" not in said


def test_an_empty_pool_of_huge_pages_is_told_where_the_load_never_ends(start: Start) -> None:
    with huge_pages(0):
        pool = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        if int(pool["HugePages_Free"]) or int(pool["HugePages_Total"]):
            pytest.skip("this machine has pages of 2 MiB in its pool")
        restore = start("--huge-pages", "2M", "--timeout", "1")
        assert restore.finish(SPELL) == 1
        if "use that or a later one" in restore.said():
            pytest.skip(f"this Firecracker is too old for it: {restore.said()}")
        assert "no memory for a page of it; are huge pages free" in restore.said()


def test_a_memory_file_of_another_vm_is_refused_in_the_pagers_words(start: Start, folder: Path, snapshot: Snapshot) -> None:
    other = folder / "other.mem"
    shutil.copyfile(snapshot.memory, other)
    os.truncate(other, other.stat().st_size + 4096)
    restore = start(memory=other)
    assert restore.finish(SPELL) == 1
    assert "the pager refused it" in restore.said()
    assert "it is not this VM's snapshot" in restore.said()


def test_two_signals_kill_the_vms_that_lack_memory_and_leave_nothing_of_them(
    start: Start, folder: Path, snapshot: Snapshot
) -> None:
    memory = folder / "vm.mem"
    shutil.copyfile(snapshot.memory, memory)
    with memory.open("r+b") as writer:
        restore = start("--clones", "3", memory=memory)
        vms = restore.event("running", SPELL)["vms"]
        # What cannot be had any more cannot come in time.
        writer.truncate(memory.stat().st_size // 2)
        restore.signal(signal.SIGTERM)
        restore.event("draining", SPELL)
        restore.signal(signal.SIGTERM)
        assert restore.finish(SPELL) == 1
    assert "stands still" not in restore.said()
    for vm in vms:
        assert f"vm-{vm['pid']}: Firecracker was killed by SIGKILL" in restore.said()
    assert list((folder / "run").iterdir()) == []


@pytest.mark.needs_root
def test_a_user_without_rights_to_the_devices_is_told_which(start: Start, folder: Path, snapshot: Snapshot) -> None:
    state = folder / "vm.state"
    shutil.copyfile(snapshot.state, state)
    folder.chmod(0o755)
    state.chmod(0o644)
    stranger = Owner(23456, 34567)
    if all(obstacle(device, stranger, READ | WRITE) is None for device in ("/dev/kvm", "/dev/userfaultfd")):
        pytest.skip("this machine's devices are open to everybody")
    restore = start("--owner", str(stranger), state=state)
    code = restore.finish(SPELL)
    if restore.seen("step")[-1]["step"] != "start":
        pytest.skip("the Firecracker to test with is where only root can reach it")
    assert code == 1
    assert "Firecracker runs as user 23456, which may not" in restore.said()
    assert "try: setfacl -m u:23456:rw /dev/" in restore.said()
    # Firecracker's own words, and below them what it wrote.
    assert "Permission denied (os error 13)" in restore.said()
