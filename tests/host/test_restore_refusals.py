"""A restore that cannot work, or goes wrong at any step, says why in the words of who knows, and leaves nothing behind.

Firecracker is played by a fault-injecting actor (actors/faulty_firecracker.py); where the memory matters, with a real
userfaultfd.
"""

import asyncio
import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from actors.faulty_firecracker import write_program, write_state_file
from actors.memory_file import PAGE, write_memory_file
from latepage import FirecrackerError, LatepageError, Policy, PolicyError, SourceError
from latepage.events import Event, NoMemory
from latepage.firecracker import Jailer, Owner, restore, restoring
from latepage.firecracker.place import Folder
from latepage.firecracker.restore import _with_words_of_the_pager

PAGES = 256


@pytest.fixture
def snapshot(folder: Path) -> tuple[Path, Path]:
    return write_state_file(folder / "vm.state"), write_memory_file(folder / "vm.mem", PAGES)


@pytest.fixture
def actor(folder: Path) -> Path:
    """A program that stands in Firecracker's place."""
    return write_program(folder / "firecracker")


@pytest.fixture
def runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private folders are made: nothing may be left in it."""
    path = folder / "run"
    path.mkdir(mode=0o755)
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return path


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def nothing_is_left(folder: Path, runtime: Path) -> Iterator[None]:
    """No process, no socket, no file, no thread, no descriptor."""
    before = descriptors(), threading.active_count(), children()
    yield
    # What pytest keeps of an expected error goes round in a circle, with the pager's descriptors in it.
    gc.collect()
    assert list(runtime.iterdir()) == []
    assert [path for path in folder.rglob("*") if path.is_socket()] == []
    assert children() == before[2]
    assert threading.active_count() == before[1]
    assert descriptors() == before[0]


Refused = Callable[..., Any]


@pytest.fixture
def refused(snapshot: tuple[Path, Path], actor: Path) -> Refused:
    """The error of a restore with a fault."""

    def run(fault: str = "", *arguments: str, **options: Any) -> LatepageError:
        options = {"firecracker": actor, "arguments": ("--fault", fault, *arguments), **options}
        state, memory = options.pop("state", snapshot[0]), options.pop("memory", snapshot[1])
        with pytest.raises((FirecrackerError, PolicyError)) as caught:
            restore(state, memory, **options)
        return caught.value

    return run


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("no-such-firecracker", "no such program on PATH"),
        ("/no/such/firecracker", "/no/such/firecracker: there is no such program"),
        ("{}/vm.mem", "may not be executed"),
        ("/usr/bin", "there is no such program"),
    ],
)
def test_a_program_that_is_none_is_named(refused: Refused, folder: Path, program: str, says: str) -> None:
    assert says in str(refused(firecracker=program.format(folder)))


def test_a_program_that_is_no_firecracker_is_quoted(refused: Refused) -> None:
    error = refused(firecracker="/usr/bin/ls", arguments=("--nonsense",))
    assert "before it answered at its API socket" in str(error)
    assert "ended with status 2" in str(error)
    assert "unrecognized option" in str(error.stderr)


def test_a_firecracker_without_a_field_that_is_needed_is_refused_with_the_version_that_has_it(refused: Refused) -> None:
    error = refused("", "--version", "1.0.0")
    assert "Firecracker 1.0.0 has no mem_backend in PUT /snapshot/load; 1.1.0 has it" in str(error)
    error = refused("", "--version", "1.15.1", clock_realtime=True)
    assert "Firecracker 1.15.1 has no clock_realtime in PUT /snapshot/load; 1.16.0 has it" in str(error)


def test_a_firecracker_too_old_to_say_its_version_is_known_by_what_it_says_of_itself(refused: Refused) -> None:
    assert "Firecracker 0.25.0 has no mem_backend" in str(refused("no-version-call", "--version", "0.25.0"))


def test_what_does_not_speak_http_is_told_apart(refused: Refused) -> None:
    assert "no answer to GET /version" in str(refused("no-json"))


def test_its_last_words_are_passed_on_when_it_ends_before_it_answers(refused: Refused) -> None:
    error = refused("dies-at-start")
    assert "ended with status 1 before it answered" in str(error)
    assert error.stderr == "Error: RunWithApi(FailedToBindSocket)"
    assert error.stderr in str(error)


def test_its_own_error_is_passed_on_whole_below_ours(refused: Refused, folder: Path) -> None:
    says = "Load snapshot error: Failed to get snapshot state from file: Invalid data version: 8.0.0"
    error = refused("refuses-to-load", "--says", says, state=write_state_file(folder / "old.state", "8.0.0"))
    assert (error.status, error.fault_message) == (400, says)
    ours, theirs = str(error).index("(Firecracker 1.13 or 1.14)"), str(error).index(f"Firecracker: {says}")
    assert ours < theirs
    assert "Error: RunWithApi(BuildMicroVmError(Restore))" in str(error)


@pytest.mark.parametrize(("device", "ours"), [("Network", "no network interface of that name"), ("Vsock", "no vsock device")])
def test_a_device_that_the_snapshot_does_not_have_is_not_told_as_a_damaged_file(refused: Refused, device: str, ours: str) -> None:
    says = (
        f"Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file: Unknown {device} Device."
    )
    error = refused("refuses-to-load", "--says", says)
    assert "damaged" not in str(error)
    assert str(error).index(ours) < str(error).index(f"Firecracker: {says}")


def test_a_vmm_that_dies_while_it_loads_is_no_hang(refused: Refused) -> None:
    error = refused("dies-in-load")
    assert "ended with status 149 while it loaded" in str(error)
    assert "thread 'fc_vmm' panicked" in str(error)


def test_a_vmm_that_dies_while_its_child_keeps_the_connection_is_no_hang_either(refused: Refused) -> None:
    # Nothing comes on the connection, not even its end: only the pidfd tells.
    assert "was killed by SIGKILL while it loaded" in str(refused("dies-and-its-child-keeps-the-socket"))


@pytest.mark.needs("/dev/userfaultfd")
def test_a_vmm_that_dies_while_it_resumes_is_no_hang(refused: Refused) -> None:
    assert "was killed by SIGKILL while it resumed" in str(refused("dies-in-resume"))


@pytest.mark.parametrize(("fault", "says"), [("hangs-in-load", "was not loaded"), ("never-listens", "did not answer")])
def test_a_step_that_takes_too_long_is_ended(refused: Refused, fault: str, says: str) -> None:
    assert f"{says} within 0.5 s" in str(refused(fault, timeout=0.5))


@pytest.mark.needs("/dev/userfaultfd")
def test_what_the_pager_refuses_is_said_in_its_words(refused: Refused) -> None:
    error = refused("", "--memory", str((PAGES + 1) * PAGE))
    assert "was killed by SIGKILL while it loaded" in str(error)
    assert "the pager refused it" in str(error)
    assert "it is not this VM's snapshot" in str(error)


def test_a_pager_without_memory_for_a_page_says_so_where_a_step_took_too_long() -> None:
    told: list[Event] = [NoMemory(at=float(n), vm="vm-1", address=n) for n in range(3)]
    error = _with_words_of_the_pager(FirecrackerError("the snapshot was not loaded within 30 s"), told)
    assert str(error).count("no memory for a page of it; are huge pages free") == 1


@pytest.mark.needs("/dev/userfaultfd")
def test_one_of_several_that_fails_takes_the_others_back(refused: Refused, folder: Path) -> None:
    # A folder in which the second socket cannot be made.
    (folder / "api-2.sock").write_text("precious")
    assert "api-2.sock: there is a file of that name" in str(refused(clones=3, api_sock=folder / "api.sock"))
    assert (folder / "api-2.sock").read_text() == "precious"
    assert "was killed by SIGKILL while it resumed" in str(refused("dies-in-resume", clones=3))


def test_files_that_are_not_there_or_not_what_they_should_be_are_refused_before_anything_starts(
    refused: Refused, folder: Path, snapshot: tuple[Path, Path], actor: Path
) -> None:
    assert "no.state: No such file" in str(refused(state=folder / "no.state"))
    assert "no regular file" in str(refused(state=folder))
    with pytest.raises(SourceError, match=r"no\.mem"):
        restore(snapshot[0], folder / "no.mem", firecracker=actor)


UNPRIVILEGED = """
import contextlib, os, sys
import latepage.cli.restore
from latepage.firecracker import FirecrackerError, restore
# What is imported on the way may be where only root can read.
with contextlib.suppress(FirecrackerError):
    restore(sys.argv[3], sys.argv[5], firecracker="/bin/false")
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
from latepage.cli import main
main()
"""


@pytest.fixture
def refused_as_nobody(folder: Path, snapshot: tuple[Path, Path]) -> Callable[..., str]:
    """What the command says to a user without any rights."""
    folder.chmod(0o755)
    (folder / "run").chmod(0o777)
    state, memory = snapshot
    for path in snapshot:
        path.chmod(0o644)
        os.chown(path, 65534, 65534)

    def run(*flags: str | Path) -> str:
        arguments = ["--state", state, "--memory", memory, "--firecracker", "/bin/false", *flags]
        command = [sys.executable, "-c", UNPRIVILEGED, "restore", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    return run


@pytest.mark.needs_root
def test_socket_paths_that_a_user_may_not_use_are_told_with_what_is_in_the_way(
    refused_as_nobody: Callable[..., str], folder: Path
) -> None:
    for name, mode in (("closed", 0o700), ("read-only", 0o755), ("sticky", 0o1777)):
        (folder / name).mkdir()
        (folder / name).chmod(mode)
    for name in ("closed/api.sock", "read-only/api.sock"):
        assert f"no right to make a file in {(folder / name).parent}" in refused_as_nobody("--api-sock", folder / name)
    with socket.socket(socket.AF_UNIX) as stale, socket.socket(socket.AF_UNIX) as live:
        stale.bind(str(folder / "sticky/stale.sock"))
        (folder / "sticky/stale.sock").chmod(0o666)
        live.bind(str(folder / "sticky/live.sock"))
        (folder / "sticky/live.sock").chmod(0o600)
        live.listen()
        assert "stale.sock: Operation not permitted" in refused_as_nobody("--api-sock", folder / "sticky/stale.sock")
        assert "a socket of another user" in refused_as_nobody("--api-sock", folder / "sticky/live.sock")
    for name in ("stale", "live"):
        (folder / f"sticky/{name}.sock").unlink()


@pytest.mark.needs_root
def test_to_run_it_as_oneself_takes_no_rights(refused_as_nobody: Callable[..., str]) -> None:
    assert "ended with status 1 before it answered" in refused_as_nobody("--owner", "65534:65534")


@pytest.mark.needs_root
def test_to_run_it_as_another_takes_root(refused_as_nobody: Callable[..., str]) -> None:
    assert "takes root" in refused_as_nobody("--owner", "65534:0")


def test_where_no_private_folder_can_be_made_each_that_was_tried_is_named(
    refused: Refused, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(**_: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    # It asks nobody else for one, who would try the working directory.
    monkeypatch.setattr("tempfile.gettempdir", read_only)
    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    assert f"no folder for the sockets: {runtime}: Read-only file system; /tmp: Read-only file system" in str(refused())


def test_a_runtime_folder_that_is_relative_or_no_text_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, folder: Path, runtime: Path
) -> None:
    # XDG Base Directory Specification: such a path is to be ignored. JSON cannot have the other.
    monkeypatch.chdir(folder)
    (folder / "\udcff").mkdir()
    for other in ("run", str(folder / "\udcff")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", other)
        private = Folder(None)
        assert private.path.parent == runtime
        private.remove()


def test_socket_paths_that_cannot_be_are_refused_before_anything_starts(refused: Refused, folder: Path) -> None:
    assert "can have 107" in str(refused(api_sock=folder / ("x" * 120)))
    assert "there is no folder" in str(refused(api_sock=folder / "none" / "api.sock"))
    assert "choose two paths" in str(refused(api_sock=folder / "one.sock", socket=folder / "one.sock"))
    assert "no UTF-8" in str(refused(api_sock=folder / "\udcff.sock"))
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(folder / "live.sock"))
        owner.listen()
        assert "another process listens there" in str(refused(api_sock=folder / "live.sock"))
    (folder / "live.sock").unlink()


@pytest.mark.needs_root
def test_a_folder_that_its_user_cannot_reach_is_named_before_anything_starts(
    refused: Refused, folder: Path, runtime: Path, snapshot: tuple[Path, Path]
) -> None:
    owner = Owner(65534, 65534)
    folder.chmod(0o755)
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    for path in snapshot:
        path.chmod(0o644)
    error = refused(api_sock=closed / "api.sock", owner=owner)
    assert f"user 65534, which may not write to {closed} (drwx------ 0:0)" in str(error)
    error = refused(state=write_state_file(closed / "vm.state"), owner=owner)
    assert f"user 65534, which may not pass through {closed}" in str(error)
    snapshot[0].chmod(0o600)
    assert f"may not read {snapshot[0]}" in str(refused(owner=owner))


@pytest.mark.needs_root
def test_of_its_users_groups_it_is_in_none_but_the_one_that_was_named(
    refused: Refused, folder: Path, snapshot: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.chmod(0o755)
    state, _ = snapshot
    state.chmod(0o640)
    os.chown(state, 0, 4242)
    monkeypatch.setattr("os.getgrouplist", lambda _name, group: [group, 4242])
    assert f"may not read {state}" in str(refused(owner=Owner(65534, 65534)))


@pytest.mark.needs_root
def test_a_runtime_folder_that_its_user_cannot_reach_is_not_taken(
    snapshot: tuple[Path, Path], refused: Refused, runtime: Path, folder: Path
) -> None:
    # The folder of private folders is closed to nobody: sockets go where nobody can reach them, to /tmp.
    folder.chmod(0o700)
    assert "state file" in str(refused(owner=Owner(65534, 65534)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clones": 0}, "clones is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"memory": None}, "where the VMs' memory comes from"),
        ({"pager_sock": "/p.sock"}, "and not both"),
        ({"memory": None, "pager_sock": "/p.sock", "policy": Policy()}, "leave socket and policy out"),
        ({"jailer": Jailer(owner=Owner(1, 1)), "api_sock": "/a.sock"}, "inside the jail"),
        ({"jailer": Jailer(owner=Owner(1, 1)), "owner": Owner(2, 2)}, "the owner is the jailer's"),
        ({"jailer": Jailer(owner=Owner(1, 1), program="/no/jailer")}, "/no/jailer: there is no such program"),
        ({"console": "/no/such/folder/console"}, "console /no/such/folder/console: No such file"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(refused: Refused, options: dict[str, Any], says: str) -> None:
    assert says in str(refused(**options))


@pytest.mark.parametrize("argument", ["--daemonize", "--uid=3", "--id=x", "--exec-file", "--chroot-base-dir=/x"])
def test_what_the_jailer_is_told_by_us_cannot_be_told_twice(argument: str) -> None:
    with pytest.raises(PolicyError, match="cannot be passed on"):
        Jailer(owner=Owner(1, 1), arguments=(argument,))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do all this")
def test_what_takes_root_says_so(refused: Refused, folder: Path) -> None:
    assert "takes root" in str(refused(owner=Owner(0, 0)))


def test_in_an_event_loop_one_is_told_of_the_other_function(snapshot: tuple[Path, Path]) -> None:
    async def wrong() -> None:
        restore(*snapshot)

    with pytest.raises(FirecrackerError, match="async with restoring"):
        asyncio.run(wrong())


def test_a_restore_that_is_cancelled_is_taken_back(snapshot: tuple[Path, Path], actor: Path) -> None:
    async def cancelled() -> None:
        started = asyncio.Event()

        async def one() -> None:
            arguments = ("--fault", "hangs-in-load")
            async with restoring(*snapshot, firecracker=actor, arguments=arguments, clones=2, on_step=lambda _: started.set()):
                raise AssertionError("it loaded")

        task = asyncio.create_task(one())
        await started.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()

    asyncio.run(cancelled())


@pytest.mark.needs("/dev/userfaultfd")
def test_what_goes_wrong_in_the_block_ends_the_vms(snapshot: tuple[Path, Path], actor: Path) -> None:
    with suppress(ZeroDivisionError), restore(*snapshot, firecracker=actor, clones=2) as vms:
        assert all(vm.process.alive for vm in vms.vms)
        _ = 1 // 0
    assert [vm.process.status for vm in vms.vms] == [-signal.SIGKILL] * 2
