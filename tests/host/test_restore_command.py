"""`latepage restore` as a process: what it tells, how it ends, and what becomes of its VMs then.

The VMs are played by a stand-in for Firecracker with real memory behind a real userfaultfd, and no guest
(actors/faulty_firecracker.py); tests/firecracker plays with the real one.
"""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from actors.faulty_firecracker import write_program, write_state_file
from actors.lines import PATIENCE, Line
from actors.memory_file import PAGE, write_memory_file
from actors.restore import Restore
from latepage.firecracker import Client
from latepage.firecracker.calls import action

PAGES = 256

pytestmark = pytest.mark.needs("/dev/userfaultfd")

Start = Callable[..., Restore]


@pytest.fixture
def flags(folder: Path) -> tuple[str | Path, ...]:
    """The flags that every restore needs."""
    state = write_state_file(folder / "vm.state")
    memory = write_memory_file(folder / "vm.mem", PAGES)
    program = write_program(folder / "firecracker")
    return "--state", state, "--memory", memory, "--firecracker", program


@pytest.fixture
def start(folder: Path, flags: tuple[str | Path, ...]) -> Iterator[Start]:
    """Starts the command; its VMs are ended with the test."""
    (folder / "run").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "XDG_RUNTIME_DIR"}
    processes: list[Restore] = []
    with ExitStack() as stack:

        def run(*more: str | Path, fault: str = "") -> Restore:
            told = [f"--firecracker-arg={part}" for part in ("--fault", fault)]
            options = {"env": {**environment, "TMPDIR": str(folder / "run")}}
            processes.append(stack.enter_context(Restore(folder, *flags, *told, *more, **options)))
            return processes[-1]

        yield run
        for process in processes:
            for pid in {line["pid"] for line in process.lines if line.get("event") == "step" and line["pid"]}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def vms(restore: Restore) -> list[Line]:
    """The VMs, once they run."""
    return list(restore.event("running")["vms"])


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run").rglob("*"))


def until(true: Callable[[], object]) -> None:
    """Looks until it is so: for what tells nobody of itself."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came"
        os.sched_yield()


def alive(pid: int) -> bool:
    """Whether a process has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_tells_each_step_with_its_time_and_then_that_the_vm_runs(start: Start) -> None:
    restore = start()
    running = restore.event("running")
    steps = restore.seen("step")
    assert [line["step"] for line in steps] == ["prepare", "start", "load", "resume"]
    assert all(line["seconds"] > 0 for line in steps)
    (vm,) = running["vms"]
    assert running["seconds"] >= sum(vm["steps"].values())
    assert vm["firecracker"] == "1.17.0"
    assert restore.seen("session-started")[0]["pid"] == vm["pid"]
    with Client(vm["api_sock"]) as client:
        assert client.info().state == "Running"


def test_it_ends_with_its_vms_and_leaves_nothing(start: Start, folder: Path) -> None:
    restore = start("--clones", "3")
    for vm in vms(restore):
        with Client(vm["api_sock"]) as client:
            client.call(action("SendCtrlAltDel"))
    assert restore.finish() == 0
    assert [line["status"] for line in restore.seen("vmm-ended")] == [0, 0, 0]
    assert left_in(folder) == []


def test_a_vm_that_is_killed_is_a_failure_and_named(start: Start, folder: Path) -> None:
    restore = start()
    (vm,) = vms(restore)
    os.kill(vm["pid"], signal.SIGKILL)
    assert restore.finish() == 1
    assert f"vm-{vm['pid']}: Firecracker was killed by SIGKILL" in restore.said()
    assert left_in(folder) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_vms_go_on_without_it(start: Start, folder: Path, number: signal.Signals) -> None:
    restore = start("--clones", "2")
    running = vms(restore)
    restore.signal(number)
    assert restore.finish() == 0
    assert len(restore.seen("detached")) == 2
    for vm in running:
        # It has all of its memory, its API answers, and what it says no longer matters to anyone.
        with Client(vm["api_sock"], timeout=10) as client:
            for _ in range(2000):
                assert client.info().state == "Running"
        assert f"vm-{vm['pid']} goes on without a pager; its API socket is {vm['api_sock']}" in restore.said()
    assert [name for name in left_in(folder) if name.endswith(".sock")] == ["api-1.sock", "api-2.sock"]


def test_a_second_signal_treats_the_vms_that_lack_memory_as_it_was_told_and_names_them(start: Start, folder: Path) -> None:
    # A writer who was there first can truncate the file: half of it cannot be had.
    with (folder / "vm.mem").open("r+b") as writer:
        restore = start()
        (vm,) = vms(restore)
        writer.truncate(PAGES * PAGE // 2)
        restore.signal(signal.SIGINT)
        restore.event("waiting-for", vm=f"vm-{vm['pid']}")
        restore.signal(signal.SIGINT)
        assert restore.finish() == 1
    assert f"vm-{vm['pid']}: Firecracker was killed by SIGKILL" in restore.said()
    assert not alive(vm["pid"])
    assert left_in(folder) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_vms_run_takes_the_restore_back(start: Start, folder: Path, number: signal.Signals) -> None:
    restore = start("--clones", "2", fault="hangs-in-load")
    pids = [restore.event("step", step="start", clone=clone)["pid"] for clone in (1, 2)]
    restore.signal(number)
    assert restore.finish() == 130
    assert "taken back" in restore.said()
    assert not any(alive(pid) for pid in pids)
    assert left_in(folder) == []


def test_a_reader_of_its_lines_who_has_gone_ends_neither_it_nor_its_vms(start: Start, folder: Path) -> None:
    restore = start("--clones", "2")
    killed, other = vms(restore)
    assert restore.child.stdout is not None
    restore.child.stdout.close()
    os.kill(killed["pid"], signal.SIGKILL)
    until(lambda: not alive(killed["pid"]))
    restore.signal(signal.SIGTERM)
    assert restore.child.wait(PATIENCE) == 1
    assert "Traceback" not in restore.said()
    assert f"vm-{other['pid']} goes on without a pager" in restore.said()
    with Client(other["api_sock"], timeout=10) as client:
        assert client.info().state == "Running"


def test_killed_itself_it_leaves_its_vms_alive(start: Start) -> None:
    restore = start()
    (vm,) = vms(restore)
    restore.signal(signal.SIGKILL)
    assert restore.finish() == -signal.SIGKILL
    assert alive(vm["pid"])


def test_a_terminals_signals_do_not_reach_the_vms(start: Start) -> None:
    restore = start()
    (vm,) = vms(restore)
    assert os.getsid(vm["pid"]) == vm["pid"]


def test_with_detach_when_full_it_ends_when_all_have_all(start: Start) -> None:
    restore = start("--clones", "2", "--populate", "background", "--detach-when-full")
    running = vms(restore)
    assert restore.finish() == 0
    assert all(alive(vm["pid"]) for vm in running)
    assert len(restore.seen("vmm-left")) == 2


def test_sockets_are_where_they_were_asked_for(start: Start, folder: Path) -> None:
    restore = start("--clones", "2", "--api-sock", folder / "vm.sock", "--socket", folder / "pager.sock")
    assert [vm["api_sock"] for vm in vms(restore)] == [str(folder / "vm-1.sock"), str(folder / "vm-2.sock")]
    assert (folder / "pager.sock").is_socket()
    for vm in restore.seen("running")[0]["vms"]:
        os.kill(vm["pid"], signal.SIGKILL)
    assert restore.finish() == 1
    assert not list(folder.glob("*.sock"))


def test_the_console_goes_to_the_file_that_was_named(start: Start, folder: Path) -> None:
    restore = start("--console", folder / "console")
    (vm,) = vms(restore)
    os.kill(vm["pid"], signal.SIGKILL)
    restore.finish()
    assert "api: PUT /snapshot/load" in (folder / "console").read_text()


def test_paused_loads_and_does_not_resume(start: Start) -> None:
    restore = start("--paused")
    assert restore.event("running")["paused"] is True
    assert [line["step"] for line in restore.seen("step")] == ["prepare", "start", "load"]


def test_metrics_and_traces_are_there_before_the_vms_are(start: Start, folder: Path) -> None:
    restore = start("--metrics", folder / "status.sock", "--record", folder / "traces")
    (vm,) = vms(restore)
    assert (folder / "status.sock").is_socket()
    until(lambda: list((folder / "traces").iterdir()))
    os.kill(vm["pid"], signal.SIGKILL)
    restore.finish()
    assert [path.name for path in (folder / "traces").iterdir()] == [f"vm-{vm['pid']}.trace"]
    assert not (folder / "status.sock").exists()


def test_a_failure_is_told_in_lines_and_ends_with_1(start: Start, folder: Path) -> None:
    restore = start(fault="dies-in-load")
    assert restore.finish() == 1
    assert restore.said().startswith("latepage: ")
    assert "thread 'fc_vmm' panicked" in restore.said()
    assert "Traceback" not in restore.said()
    assert left_in(folder) == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--owner", "root"), "UID:GID"),
        (("--network", "eth0"), "INTERFACE=DEVICE"),
        (("--jailer", "jailer"), "--owner UID:GID"),
        (("--jail-id", "x"), "for --jailer"),
        (("--clones", "0"), "clones is 0"),
        (("--timeout", "-1"), "timeout is -1"),
        (("--fault-around", "3"), "--fault-around"),
        (("--jailer", "jailer", "--owner", "1:1", "--jailer-arg=--daemonize"), "cannot be passed on"),
    ],
    ids=str,
)
def test_what_is_not_understood_ends_with_2(start: Start, folder: Path, more: tuple[str, ...], says: str) -> None:
    restore = start(*more)
    assert restore.finish() == 2
    assert says in restore.said()
    assert left_in(folder) == []


def on_a_terminal(flags: tuple[str | Path, ...]) -> tuple["subprocess.Popen[bytes]", int]:
    """The command on a terminal, and the terminal's other end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "latepage", "restore", *map(str, flags)]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "120"})
    os.close(theirs)
    return child, ours


def test_a_terminal_that_is_closed_ends_neither_it_nor_its_vm(flags: tuple[str | Path, ...], folder: Path) -> None:
    api_sock = folder / "vm.sock"
    child, ours = on_a_terminal((*flags, "--api-sock", api_sock))
    shown = ""
    while "running: 1 VM after" not in shown:
        shown += os.read(ours, 65536).decode(errors="replace")
    os.close(ours)
    pid = re.search(r"pid (\d+)", shown)
    assert pid is not None
    try:
        child.send_signal(signal.SIGHUP)
        assert child.wait(10) == 0
        with Client(api_sock, timeout=10) as client:
            assert client.info().state == "Running"
    finally:
        child.kill()
        os.kill(int(pid[1]), signal.SIGKILL)


def test_on_a_terminal_it_shows_the_steps_and_then_the_vm(flags: tuple[str | Path, ...]) -> None:
    child, ours = on_a_terminal(flags)
    shown = ""
    with suppress(OSError):  # EIO: the other end is closed
        while data := os.read(ours, 65536):
            shown += data.decode(errors="replace")
            pid = re.search(r"pid (\d+)", shown)
            if "running: 1 VM after" in shown and pid:
                with suppress(ProcessLookupError):
                    os.kill(int(pid[1]), signal.SIGKILL)
    os.close(ours)
    assert child.wait(10) == 1
    for step in ("prepare", "start", "load", "resume"):
        assert re.search(rf"{step} +\d+\.\d ms", shown)
