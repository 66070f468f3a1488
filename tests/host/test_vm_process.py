"""The reference VMM as a process: its events, its API socket, its end, and what bad input gets."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.serve import Serve
from latepage import GuestError
from latepage.kvm import Client, Job, VmProcess

MEMORY = 16 << 20
PAGES = (MEMORY - (2 << 20)) // 4096
VERIFY = Job("verify", order="random", seed=1)

Snapshot = tuple[Path, Path]


@pytest.fixture
def snapshot(folder: Path) -> Snapshot:
    """A VM of two regions that was filled and saved."""
    files = folder / "vm.state", folder / "vm.mem"
    with VmProcess.create(Job("fill", seed=7), memory=MEMORY, split=True, vcpus=2, save=files) as vm:
        vm.event("saved")
        assert vm.wait() == 0
    return files


def refused(*arguments: str | Path | int) -> tuple[int, str]:
    """The exit status and the words of a VM that cannot be."""
    command = [sys.executable, "-m", "latepage.kvm", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stdout
    return done.returncode, done.stderr


def test_it_tells_its_story_in_lines_of_json() -> None:
    with VmProcess.create(Job("fill", seed=7), VERIFY, memory=MEMORY, name="vm-7", compare=True) as vm:
        story = list(vm.events())
        assert vm.wait() == 0
    kinds = [event["event"] for event in story]
    assert kinds[0] == "started"
    assert kinds[-2:] == ["compared", "ended"]
    assert kinds.index("first_instruction") < kinds.index("progress") < kinds.index("job_done")
    assert {event["vm"] for event in story} == {"vm-7"}
    started = story[0]
    assert started["guest"] in {"kvm", "threads"}
    assert started["pid"] == vm.pid
    assert started["pages"] == PAGES


@pytest.mark.parametrize("way", ["read", "map_file"])
def test_a_restored_vm_holds_what_was_saved(snapshot: Snapshot, way: str) -> None:
    state, memory = snapshot
    where = {way: memory}
    with VmProcess.restore(state, VERIFY, compare=True, **where) as vm:  # type: ignore[arg-type]
        assert vm.done().is_right
        compared = vm.event("compared")
        assert compared["pages"] == PAGES
        assert not compared["wrong_pages"]
        assert vm.wait() == 0


@pytest.mark.needs("/dev/userfaultfd")
@pytest.mark.parametrize(
    ("handshake", "backing", "send_memory"),
    [
        ("firecracker", "anonymous", None),
        ("latepage", "anonymous", None),
        ("latepage", "private", False),
        ("latepage", "private", True),
        ("latepage", "shared", False),
        ("latepage", "shared", True),
    ],
)
def test_a_vm_restored_through_a_pager_holds_what_was_saved(
    snapshot: Snapshot, serve: Callable[..., Serve], folder: Path, handshake: str, backing: str, send_memory: bool | None
) -> None:
    state, memory = snapshot
    pager = serve(source=memory)
    options = {"handshake": handshake, "backing": backing, "send_memory": send_memory}
    with VmProcess.restore(state, pager=pager.socket, api_sock=folder / "vm.sock", name="vm-p", **options) as vm:  # type: ignore[arg-type]
        vm.event("started")
        session = pager.event("session-started")
        assert session["form"] == handshake
        assert session["vm"] == ("vm-p" if handshake == "latepage" else f"vm-{vm.pid}")
        with vm.client() as client:
            client.run(VERIFY)
            client.discard(100, 200)
            report = client.wait()
            assert report.is_right
            client.run(Job("verify", pages=((90, 300),)))
            assert client.wait().is_right
            client.run(Job("dirty", seed=8, pages=((150, 10), (3000, 10))))
            assert client.wait().is_right
            assert client.compare().is_right
            assert client.report().contents == {7: PAGES - 210, 8: 20, None: 190}
            assert client.report().pager == (str(pager.socket), handshake)


@pytest.mark.needs("/dev/userfaultfd")
@pytest.mark.parametrize("backing", ["anonymous", "private", "shared"])
@pytest.mark.parametrize("shards", [2, 7, 64])
def test_a_vm_of_several_shards_holds_what_was_saved(
    snapshot: Snapshot, serve: Callable[..., Serve], folder: Path, backing: str, shards: int
) -> None:
    state, memory = snapshot
    pager = serve(source=memory)
    options = {"backing": backing, "shards": shards}
    with VmProcess.restore(state, pager=pager.socket, api_sock=folder / "vm.sock", name="vm-s", **options) as vm:  # type: ignore[arg-type]
        assert vm.event("started")["shards"] == [shards, None]
        with vm.client() as client:
            client.run(VERIFY)
            # The middle of memory is the end of a shard, whatever their number.
            client.discard(PAGES // 2 - 600, 1200)
            assert client.wait().is_right
            client.run(VERIFY)
            assert client.wait().is_right
            assert client.compare().is_right
            assert client.report().shards == (shards, None)
            client.quit()
        assert vm.wait() == 0
    assert pager.event("ended")["reason"] == "gone"


@pytest.mark.needs("/dev/userfaultfd")
def test_shards_that_suit_a_vm_are_one_for_each_sixteen_vcpus(folder: Path, serve: Callable[..., Serve]) -> None:
    files = folder / "vm.state", folder / "vm.mem"
    with VmProcess.create(Job("fill", seed=7), memory=MEMORY, vcpus=40, guest="threads", save=files) as vm:
        assert vm.wait() == 0
    pager = serve(source=files[1])
    instead = "Firecracker's handshake has one userfaultfd: 1 shard, where 40 vCPUs call for 3"
    for handshake, shards in (("latepage", [3, None]), ("firecracker", [1, instead])):
        options = {"handshake": handshake, "shards": "auto", "guest": "threads"}
        with VmProcess.restore(files[0], VERIFY, pager=pager.socket, **options) as vm:  # type: ignore[arg-type]
            assert vm.event("started")["shards"] == shards
            assert vm.done().is_right
            assert vm.wait() == 0


@pytest.mark.needs("/dev/userfaultfd")
def test_the_command_line_tells_of_shards(snapshot: Snapshot, serve: Callable[..., Serve]) -> None:
    state, memory = snapshot
    pager = serve(source=memory)

    def restore(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "latepage", "vm", "restore", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = restore(state, "--pager", pager.socket, "--shards", "3", "--verify", "random")
    assert done.returncode == 0, done.stderr
    assert "; 3 shards" in done.stdout
    assert "auto" not in restore(state, "--pager", pager.socket, "--shards", "auto").stderr
    for shards in ("many", "1.5", "-1", "5000"):
        done = restore(state, "--pager", pager.socket, f"--shards={shards}")
        assert done.returncode != 0
        assert f"'{shards}' is no number of shards" in done.stderr
    done = restore(state, "--map", memory, "--shards", "2")
    assert (done.returncode, done.stderr) == (2, "latepage vm restore: --shards goes with --pager only\n")


def test_shards_that_cannot_be_are_refused(snapshot: Snapshot) -> None:
    state, memory = snapshot
    nobody = ("--pager", "/nowhere")
    assert refused("restore", state, "--read", memory, "--shards", 2) == (2, "latepage.kvm: --shards goes with --pager only\n")
    for wrong in (65, 0, -1, "many"):
        said = refused("restore", state, *nobody, "--shards", wrong)[1]
        assert f"'{wrong}' is no number of shards: give 1 to 64, or auto" in said
    posts = refused("restore", state, *nobody, "--delivery", "notify", "--shards", 2)[1]
    assert "with the delivery notify vCPUs post to a channel: shards go with uffd" in posts
    of_one = refused("restore", state, *nobody, "--handshake", "firecracker", "--shards", 2)[1]
    assert "Firecracker's handshake has one userfaultfd, not 2; use --handshake latepage" in of_one


@pytest.mark.needs("/dev/userfaultfd")
def test_a_vm_says_that_its_pager_is_gone_and_ends_when_it_is_told_to(snapshot: Snapshot, serve: Callable[..., Serve]) -> None:
    state, memory = snapshot
    pager = serve(source=memory)
    with VmProcess.restore(state, Job("count"), pager=pager.socket) as vm:
        vm.event("first_instruction")
        pager.signal(signal.SIGKILL)
        vm.event("pager_gone")
        assert vm.end() == 0


@pytest.mark.needs("/dev/userfaultfd")
def test_a_vm_that_waits_for_a_pager_that_stands_still_ends_when_it_is_told_to(
    snapshot: Snapshot, serve: Callable[..., Serve], folder: Path
) -> None:
    state, memory = snapshot
    pager = serve(source=memory)
    pager.signal(signal.SIGSTOP)
    api_sock = folder / "vm.sock"
    with VmProcess.restore(state, VERIFY, pager=pager.socket, api_sock=api_sock) as vm:
        vm.event("started")
        assert vm.end() == 0
    assert not api_sock.exists()


def test_one_corrupted_byte_is_named_and_the_exit_status_tells(snapshot: Snapshot) -> None:
    state, memory = snapshot
    with memory.open("r+b") as file:
        file.seek((2 << 20) + 1234 * 4096)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with VmProcess.restore(state, VERIFY, map_file=memory, compare=True) as vm:
        assert vm.event("wrong_page")["page"] == 1234
        assert vm.done().wrong == (1234,)
        assert vm.event("compared")["wrong"] == [1234]
        assert vm.wait() == 1


def test_the_api_socket_does_all_that_a_vmm_does(folder: Path) -> None:
    api_sock = folder / "vm.sock"
    with VmProcess.create(memory=MEMORY, api_sock=api_sock, backing="shared") as vm:
        vm.event("started")
        with Client(api_sock) as client:
            client.run(Job("fill", seed=3))
            assert client.wait().done == PAGES
            client.pause()
            assert client.report().status == "paused"
            client.run(Job("count"))
            with pytest.raises(TimeoutError):
                client.wait(timeout=0)
            saved = client.save(folder / "s", folder / "m")
            assert saved.memory_bytes == (folder / "m").stat().st_size == MEMORY
            client.resume()
            client.stop()
            client.discard(gpa=2 << 20, size=8192)
            assert client.report().contents == {None: 2, 3: PAGES - 2}
            with pytest.raises(GuestError, match="no fingerprint page"):
                client.discard(gpa=4096, size=4096)
            assert client.compare().is_right
            client.quit()
        vm.event("ended")
        assert vm.wait() == 0
    assert not api_sock.exists()


def test_a_vm_saved_in_the_middle_of_a_job_goes_on_with_it(folder: Path) -> None:
    with VmProcess.create(Job("fill", seed=3), memory=MEMORY, guest="auto", api_sock=folder / "vm.sock") as vm:
        vm.event("idle")
        with vm.client() as client:
            client.pause()
            client.run(VERIFY)
            client.save(folder / "s", folder / "m")
    with VmProcess.restore(folder / "s", read=folder / "m", compare=True) as vm:
        report = vm.done()
        assert report.job == VERIFY
        assert report.done == PAGES
        assert vm.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_in_the_middle_of_a_job(folder: Path, number: signal.Signals) -> None:
    api_sock = folder / "vm.sock"
    with VmProcess.create(Job("count"), memory=MEMORY, api_sock=api_sock) as vm:
        vm.event("first_instruction")
        vm.process.send_signal(number)
        ended = vm.event("ended")
        assert ended["error"] is None
        assert vm.wait() == 0
    assert not api_sock.exists()


def test_what_no_vm_can_be_is_refused_in_one_line_with_status_2(snapshot: Snapshot) -> None:
    state, memory = snapshot
    refusals: list[tuple[list[str | Path], str]] = [
        (["create", "--memory", "3000000"], "multiple of 2 MiB"),
        (["create", "--memory", "4194304", "--vcpus", "65"], "1 to 64"),
        (["create", "--memory", "4194304", "--name", "a b"], "a b"),
        (["restore", state, "--map", memory, "--backing", "hugetlb"], "cannot be hugetlb"),
    ]
    for arguments, why in refusals:
        status, said = refused(*arguments)
        assert status == 2
        assert why in said
        assert said.count("\n") == 1


def test_files_and_sockets_that_are_not_what_they_should_be_are_refused_in_one_line(snapshot: Snapshot, folder: Path) -> None:
    state, memory = snapshot
    later = folder / "later.state"
    later.write_text(state.read_text().replace('"version":1', '"version":2'))
    short = folder / "short.mem"
    short.write_bytes(bytes(4096))
    taken = folder / "taken"
    taken.write_text("mine")
    (folder / "live.sock").unlink(missing_ok=True)
    live = socket.socket(socket.AF_UNIX)
    live.bind(str(folder / "live.sock"))
    live.listen()
    refusals: list[tuple[list[str | Path], str]] = [
        (["restore", folder / "none", "--map", memory], "none"),
        (["restore", later, "--map", memory], "its version is 2"),
        (["restore", memory, "--map", memory], "no state file"),
        (["restore", state, "--map", folder / "none"], "none"),
        (["restore", state, "--read", short], "has 4096 bytes"),
        (["restore", state, "--pager", folder / "none"], "is `latepage serve` running there?"),
        (["create", "--memory", str(MEMORY), "--api-sock", taken], "no socket"),
        (["create", "--memory", str(MEMORY), "--api-sock", folder / "live.sock"], "listens there already"),
        (["create", "--memory", str(MEMORY), "--api-sock", folder / ("x" * 120)], "107 bytes"),
    ]
    for arguments, why in refusals:
        status, said = refused(*arguments)
        assert status == 1, said
        assert why in said
        assert said.count("\n") == 1
    live.close()
    assert taken.read_text() == "mine"


def test_a_stale_api_socket_is_replaced(folder: Path) -> None:
    api_sock = folder / "vm.sock"
    with VmProcess.create(memory=MEMORY, api_sock=api_sock) as vm:
        vm.event("started")
        vm.process.kill()
        vm.wait()
    assert api_sock.exists()
    with VmProcess.create(memory=MEMORY, api_sock=api_sock) as vm:
        vm.event("started")
        with vm.client() as client:
            assert client.report().status == "running"


def test_the_command_line_says_the_same_in_words(folder: Path) -> None:
    def latepage(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "latepage", "vm", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    files = (folder / "s", folder / "m")
    said = latepage("run", "--memory", "16MiB", "--fill", "3", "--verify", "random", "--compare", "--save", *files)
    assert "verify (random): 3584 pages" in said
    assert "KVM" in said
    assert f"compared every byte of {PAGES} pages, all right" in said
    lines = latepage("restore", files[0], "--map", files[1], "--verify", "strided", "--json").splitlines()
    assert json.loads(lines[-1])["event"] == "ended"
    with VmProcess.restore(files[0], map_file=files[1], api_sock=folder / "vm.sock", name="vm-c") as vm:
        vm.event("started")
        latepage("discard", vm.api_sock or "", "--first", "5", "--count", "2")
        latepage("pause", vm.api_sock or "")
        assert "vm-c: paused" in latepage("report", vm.api_sock or "")
        latepage("resume", vm.api_sock or "")
        assert "all right" in latepage("job", vm.api_sock or "", "verify", "--pages", "0+10", "--order", "random")
        assert json.loads(latepage("compare", vm.api_sock or "", "--json"))["wrong_pages"] == 0
        latepage("quit", vm.api_sock or "")
        assert vm.wait() == 0
