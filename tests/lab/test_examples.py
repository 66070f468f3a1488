"""The two small VMMs in examples/vmm, run as a user would run them: the guest adds up its memory, and they check the sum."""

import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actors.serve import Serve

ROOT = Path(__file__).parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug"
PAGES = 64


def example(name: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TARGET / name, *arguments], check=False, capture_output=True, text=True, timeout=120)


def test_a_vcpu_brings_its_own_pages(folder: Path) -> None:
    ran = example("vmm-exit", folder / "snapshot.mem")
    assert (ran.returncode, ran.stderr) == (0, "")
    # Four pages come with each exit.
    assert ran.stdout == f"{PAGES} pages came in {PAGES // 4} exits\n"


@pytest.mark.needs_kernel("userfault")
def test_another_process_brings_them(folder: Path) -> None:
    assert example("vmm-notify", folder / "snapshot.mem").returncode == 0
    with Serve(folder / "late.sock", folder / "snapshot.mem", "--fault-around", "4KiB") as serve:
        serve.event("listening")
        ran = example("vmm-notify", folder / "snapshot.mem", folder / "late.sock")
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout == f"{PAGES} pages came in {PAGES} exits\n"


@pytest.mark.needs_kernel("userfault")
def test_a_pager_that_goes_away_is_not_waited_for(folder: Path) -> None:
    assert example("vmm-notify", folder / "snapshot.mem").returncode == 0
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as threads:
        listener.bind(str(folder / "late.sock"))
        listener.listen()
        running = threads.submit(example, "vmm-notify", folder / "snapshot.mem", folder / "late.sock")
        with listener.accept()[0] as pager:
            assert b'"notify"' in pager.recv(65536)
        ran = running.result()
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "the pager went before page 0 came" in ran.stderr


@pytest.mark.needs_kernel("stock")
def test_without_kvm_userfault_it_is_said(folder: Path) -> None:
    assert example("vmm-notify", folder / "snapshot.mem").returncode == 0
    ran = example("vmm-notify", folder / "snapshot.mem", folder / "late.sock")
    assert ran.returncode == 1
    assert "this kernel has no KVM Userfault" in ran.stderr
