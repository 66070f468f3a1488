"""`latepage check` says what a host offers: by trying it, and whoever asks."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.check import UNPRIVILEGED, check
from actors.memory_file import PAGE
from actors.peer import Peer
from actors.serve import Serve
from latepage.check import check_host
from latepage.check.pager import DESCRIPTORS_FOR_A_RECORDED_VM, DESCRIPTORS_FOR_A_VM, DESCRIPTORS_FOR_ITSELF

PR_GET_DUMPABLE = 3
SUBJECTS = ("Kernel", "The pager", "userfaultfd", "KVM", "Memory of guests", "Deliveries")


def test_the_exit_status_is_what_the_report_says() -> None:
    said = check("--json")
    assert said.status == (0 if said.report["can_serve"] else 1)
    assert said.report["lacking"] == [
        key for key, item in said.report["items"].items() if item["need"] == "serve" and item["state"] == "no"
    ]


def test_the_table_names_every_subject_and_ends_with_the_verdict() -> None:
    said = check()
    for subject in SUBJECTS:
        assert f"\n{subject}" in f"\n{said.output}"
    assert "`latepage serve` can" in said.output.splitlines()[-1]
    assert said.errors == ""


def test_an_output_without_unicode_has_marks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    said = check()
    assert said.errors == ""
    assert "\n+  Linux " in said.output
    assert "\n+ there " in said.output


def test_every_lack_comes_with_what_to_do() -> None:
    for item in check("--json", "--vmm-user", "65533:65533").report["items"].values():
        assert item["state"] != "no" or item["need"] in ("info", "later") or item["todo"], item


def test_nobody_is_ever_told_to_open_userfaultfd_to_everybody() -> None:
    said = check("--vmm-user", "65533:65533")
    assert "unprivileged_userfaultfd=1" not in said.output


def test_the_deliveries_that_latepage_has_are_told_from_those_to_come() -> None:
    deliveries = check("--json").report["deliveries"]
    assert {name: delivery["in_latepage"] for name, delivery in deliveries.items()} == {
        "uffd": True,
        "exit": True,
        "notify": True,
    }
    for delivery in deliveries.values():
        assert (delivery["kernel"] == "yes") == (not delivery["lacks"])


@pytest.mark.needs("/dev/userfaultfd", "/dev/kvm")
def test_with_every_right_nothing_is_left_untried() -> None:
    items = check("--json").report["items"]
    assert items["userfaultfd.device"]["state"] == "yes"
    assert items["pager.install_copy"]["state"] == "yes"
    assert items["kvm.vm"]["state"] == "yes"
    assert items["kvm.userfaultfd"]["state"] == "yes"
    assert items["kvm.exit_by_attributes"]["state"] != "unknown"
    assert items["kvm.exit_by_userfault"]["state"] != "unknown"


def test_the_cores_and_the_nice_value_that_are_named_may_be_had() -> None:
    core = min(os.sched_getaffinity(0))
    items = check("--json", under=("taskset", "--cpu-list", str(core))).report["items"]
    assert items["pager.cores"]["value"]["allowed"] == [core]
    lowest = items["pager.nice"]["value"]["lowest"]
    become = f"import os; os.setpriority(os.PRIO_PROCESS, 0, {lowest}); print(os.getpriority(os.PRIO_PROCESS, 0))"
    if lowest < 0:
        assert subprocess.check_output([sys.executable, "-c", become], text=True) == f"{lowest}\n"
    else:
        assert "LimitNICE" in items["pager.nice"]["todo"]


@pytest.mark.needs_root
def test_without_rights_it_works_and_says_what_was_not_tried() -> None:
    said = check("--json", under=UNPRIVILEGED)
    items = said.report["items"]
    assert said.status == 0, "a pager needs no right to userfaultfd, and none to KVM"
    assert items["pager.kill"]["state"] == "no"
    assert items["userfaultfd.device"]["state"] == ("yes" if Path("/dev/userfaultfd").stat().st_mode & 0o006 == 0o006 else "no")
    assert items["pager.install_copy"]["state"] == "yes", "tried with a userfaultfd for user space alone"
    assert items["kvm.vm"]["state"] in ("unknown", "yes")
    assert said.errors == ""


@pytest.mark.needs_root
def test_a_vmm_user_is_tried_by_root_and_read_off_by_others() -> None:
    by_root = check("--json", "--vmm-user", "65533:65533").report
    by_nobody = check("--json", "--vmm-user", "65533:65533", under=UNPRIVILEGED).report
    for key in ("vmm.userfaultfd", "vmm.kvm"):
        assert by_root["items"][key]["value"]["tried"]
        assert not by_nobody["items"][key]["value"]["tried"]
        assert by_root["items"][key]["state"] == by_nobody["items"][key]["state"]


@pytest.mark.needs_root
@pytest.mark.needs("/dev/userfaultfd")
def test_a_vmm_user_without_a_right_ends_with_1_and_the_grant_that_it_lacks() -> None:
    if Path("/dev/userfaultfd").stat().st_mode & 0o006:
        pytest.skip("/dev/userfaultfd is open to everybody here")
    said = check("--vmm-user", "65533:65533")
    assert said.status == 1
    assert "setfacl -m u:65533:rw /dev/userfaultfd" in said.output
    assert "cannot serve VMs of 65533:65533" in " ".join(said.output.split())
    assert check("--vmm-user", "root").status == check().status


@pytest.mark.needs_root
@pytest.mark.needs("/dev/userfaultfd", "/dev/kvm")
def test_the_grant_that_is_recommended_is_enough(folder: Path) -> None:
    # Nodes of our own with the ACL, over the real ones, where only this process and its child see them.
    script = """
import os, struct, subprocess, sys, tempfile
folder = tempfile.mkdtemp(dir=sys.argv[1])
acl = struct.pack("<I", 2)
for tag, bits, who in ((1, 6, -1), (2, 6, 65533), (4, 0, -1), (0x10, 6, -1), (0x20, 0, -1)):
    acl += struct.pack("<HHi", tag, bits, who)
for device in ("/dev/userfaultfd", "/dev/kvm"):
    node = os.path.join(folder, os.path.basename(device))
    os.mknod(node, 0o020600, os.stat(device).st_rdev)
    os.setxattr(node, "system.posix_acl_access", acl)
    subprocess.run(["mount", "--bind", node, device], check=True)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
    alone = ("unshare", "--mount", "--propagation", "private")
    probe = subprocess.run(
        [*alone, sys.executable, "-c", script, str(folder), "-c", ""], check=False, capture_output=True, text=True
    )
    if probe.returncode != 0:
        pytest.skip(f"no device nodes of our own: {probe.stderr.splitlines()[-1]}")
    command = ["-m", "latepage", "check", "--json", "--vmm-user"]
    for user, allowed in (("65533:65533", True), ("65532:65532", False)):
        done = subprocess.run(
            [*alone, sys.executable, "-c", script, str(folder), *command, user], check=False, capture_output=True, text=True
        )
        report = json.loads(done.stdout)
        assert [report["items"][key]["value"]["allowed"] for key in ("vmm.userfaultfd", "vmm.kvm")] == [allowed, allowed]
        assert (done.returncode == 0) == report["can_serve"] == allowed
        assert [2, 6, 65533] in report["items"]["userfaultfd.device"]["value"]["acl"]


@pytest.mark.needs_root
def test_becoming_a_vmm_user_leaves_this_process_as_it_was() -> None:
    def state() -> tuple[object, ...]:
        descriptors = [link.name for link in Path("/proc/self/fd").iterdir()]
        dumpable = ctypes.CDLL(None).prctl(PR_GET_DUMPABLE)
        return os.getresuid(), os.getresgid(), os.getgroups(), len(descriptors), dumpable

    before = state()
    check_host("65533:65533")
    assert state() == before


@pytest.mark.needs("/dev/userfaultfd")
@pytest.mark.parametrize("recorded", [False, True])
def test_the_room_for_vms_is_reckoned_by_what_they_take(
    serve: Callable[..., Serve], peer: Callable[[], Peer], folder: Path, recorded: bool
) -> None:
    pager = serve(*(("--record", str(folder / "traces")) if recorded else ()))
    each = DESCRIPTORS_FOR_A_RECORDED_VM if recorded else DESCRIPTORS_FOR_A_VM
    alone = len(pager.descriptors())
    assert alone <= DESCRIPTORS_FOR_ITSELF
    for backing in ("anonymous", "shared"):
        vm = peer()
        vm.map(256 * PAGE, backing)
        pager.event("session-started", vm=vm.introduce(pager.socket, form="latepage"))
    while recorded and len(list((folder / "traces").iterdir())) < 2:
        os.sched_yield()
    # A memory file that is shared is written through a descriptor of its own.
    assert 2 * (each - 1) < len(pager.descriptors()) - alone <= 2 * each + 1


def test_a_user_that_is_none_is_not_understood() -> None:
    said = check("--vmm-user", "no such user")
    assert (said.status, said.output) == (2, "")
    assert "there is no user" in said.errors


def test_serve_and_check_say_the_same_of_a_lack(folder: Path, memory_file: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give up CAP_KILL")
    under = ("setpriv", "--bounding-set", "-kill")
    todo = check("--json", under=under).report["items"]["pager.kill"]["todo"]
    with Serve(folder / "pager.sock", memory_file, "--mode", "0666", under=under) as pager:
        pager.event("listening")
        assert todo in pager.said()
