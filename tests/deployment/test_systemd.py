"""The systemd unit: what it starts exists, works with no more rights than it gives, and drains when it is stopped."""

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.lines import LineProcess
from actors.memory_file import write_memory_file

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"
UNIT = UNITS / "latepage@.service"
LATEPAGE = Path(sys.executable).with_name("latepage")


def settings() -> configparser.SectionProxy:
    unit = configparser.RawConfigParser(strict=False)
    setattr(unit, "optionxform", str)  # noqa: B010 (keys keep their case; mypy takes it for a method)
    unit.read(UNIT)
    return unit["Service"]


def command(folder: Path) -> list[str]:
    """What the unit starts for the instance `base`, with the host's folders below `folder` and a free port."""
    environment = dict(
        line.split("=", 1) for line in (UNITS / "base.env").read_text().splitlines() if line and not line.startswith("#")
    )
    line = settings()["ExecStart"].replace("%i", "base")
    for name, value in environment.items():
        line = line.replace("${" + name + "}", value).replace("$" + name, value)
    assert "$" not in line
    assert "%" not in line
    line = re.sub(r":\d+$", ":0", line).replace("/usr/local/bin/latepage", str(LATEPAGE))
    # Where a test wants a page to be missing, none may come by itself.
    line = line.replace("--populate background", "--populate none")
    for place in ("/run/latepage/base", "/var/lib/latepage"):
        line = line.replace(place, str(folder))
    return shlex.split(line)


@contextmanager
def started(folder: Path, *under: str) -> Iterator[LineProcess]:
    with LineProcess([*under, *command(folder), "--json"]) as pager:
        pager.event("listening")
        yield pager


def test_systemd_understands_the_unit(folder: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    unit = folder / "latepage@base.service"
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/latepage", str(LATEPAGE)))
    done = subprocess.run(["systemd-analyze", "verify", unit], check=False, capture_output=True, text=True)
    about_it = [line for line in done.stderr.splitlines() if "latepage" in line]
    assert (done.returncode, about_it) == (0, [])


def test_stopping_the_unit_drains_and_never_kills() -> None:
    unit = settings()
    assert (unit["KillSignal"], unit["TimeoutStopSec"], unit["SendSIGKILL"]) == ("SIGTERM", "infinity", "no")
    assert unit["RuntimeDirectory"] in unit["ExecStart"]


def test_what_the_unit_starts_listens_and_ends_with_0_on_sigterm(folder: Path) -> None:
    write_memory_file(folder / "base.mem", 256)
    with started(folder) as pager:
        pager.signal(signal.SIGTERM)
        pager.event("drained")
        assert pager.finish() == 0
    assert not (folder / "vm.sock").exists()


@pytest.mark.needs("/dev/userfaultfd")
@pytest.mark.needs_root
def test_the_rights_of_the_unit_are_enough_to_serve_and_to_kill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VMM of another user is served, and killed when its page cannot be had."""
    # As its CacheDirectory has it: a folder of the service's own user.
    monkeypatch.setenv("CACHE_DIRECTORY", str(folder))
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv")
    capabilities = settings()["AmbientCapabilities"].lower().replace("cap_", "+").split()
    assert capabilities == settings()["CapabilityBoundingSet"].lower().replace("cap_", "+").split()
    given = ",".join(capabilities)
    nobody = "65534"
    drop = ["setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups", "--no-new-privs"]
    drop += [f"--inh-caps=-all,{given}", f"--ambient-caps=-all,{given}", f"--bounding-set=-all,{given}"]
    if subprocess.run([*drop, LATEPAGE, "--version"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this checkout cannot be read by other users")
    os.chown(folder, int(nobody), int(nobody))
    saved = ("--save", folder / "vm.state", folder / "base.mem")
    subprocess.run([LATEPAGE, "vm", "run", "--memory", "8MiB", "--fill", "7", *saved], check=True, capture_output=True)
    restore: list[str | Path] = [LATEPAGE, "vm", "restore", folder / "vm.state", "--pager", folder / "vm.sock"]
    with started(folder, *drop) as pager:
        subprocess.run([*restore, "--verify", "random", "--compare"], check=True, capture_output=True)
        pager.event("ended")
        assert not pager.seen("warning"), "root's file is served under a lease"
        pager.signal(signal.SIGTERM)
        assert pager.finish() == 0
    # Who had the file open for writing first can truncate it: its pages cannot be had.
    with (
        (folder / "base.mem").open("r+b") as writer,
        started(folder, *drop) as pager,
        LineProcess([*restore, "--paused", "--api-sock", folder / "api.sock", "--json"]) as vm,
    ):
        vm.event("started")
        # The VM's word alone is not enough: a pager that finds the file empty at the handshake refuses the VM.
        pager.event("session-started")
        writer.truncate(0)
        subprocess.run([LATEPAGE, "vm", "resume", folder / "api.sock"], check=False, capture_output=True)
        subprocess.run([LATEPAGE, "vm", "job", folder / "api.sock", "verify"], check=False, capture_output=True)
        pager.event("failed")
        assert vm.child.wait(10) == -signal.SIGKILL
