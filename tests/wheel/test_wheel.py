"""The wheel that `make wheel` leaves in dist/: what is in it, and that it works where there is nothing else of ours."""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.lines import LineProcess

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "python" / "latepage"


@pytest.fixture(scope="module")
def wheel() -> Path:
    found = sorted((ROOT / "dist").glob("latepage-*.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip("no wheel in dist/: make wheel")
    if found[-1].stat().st_mtime < max(path.stat().st_mtime for path in SOURCES.rglob("*.py")):
        pytest.skip("the wheel in dist/ is older than the sources: make wheel")
    return found[-1]


@pytest.fixture(scope="module")
def empty_venv(wheel: Path) -> Iterator[Path]:
    """A venv with the wheel and what it requires, in the versions of the lock, and its folder the only one at hand."""
    with tempfile.TemporaryDirectory(prefix="latepage-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        pins = re.findall(r"^[\w.-]+==[^ \\\n]+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
        (folder / "pins").write_text("\n".join(pins))
        pip: list[str | Path] = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            folder / "venv/bin/python",
            "--disable-pip-version-check",
            "--quiet",
        ]
        done = subprocess.run(
            [*pip, "install", "--retries=1", "--only-binary=:all:", "--constraint", folder / "pins", wheel],
            check=False,
            capture_output=True,
            text=True,
            cwd=folder,
        )
        if "connection" in done.stderr and "Retrying" in done.stderr:
            pytest.skip("no package index can be reached")
        assert done.returncode == 0, done.stderr
        yield folder


def run(folder: Path, *command: str | Path, exit_codes: tuple[int, ...] = (0,)) -> str:
    """What a program of the venv prints; the checkout is neither the current folder nor on any path."""
    done = subprocess.run(
        [folder / "venv/bin" / command[0], *command[1:]],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": f"{folder}/venv/bin:/usr/bin:/bin"},
    )
    assert done.returncode in exit_codes, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    package = {name.removeprefix("latepage/") for name in names if name.startswith("latepage/")}
    sources = {
        str(path.relative_to(SOURCES))
        for path in SOURCES.rglob("*")
        if path.is_file() and path.suffix != ".so" and "__pycache__" not in path.parts
    }
    assert package == sources | {"_core.abi3.so"}
    about = {name.partition(".dist-info/")[2] for name in names if not name.startswith("latepage/")}
    assert about == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "sboms/latepage-python.cyclonedx.json",
    }


def test_the_wheel_is_typed_and_licensed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "License-Expression: Apache-2.0" in archive.read(f"{folder}/METADATA").decode()
        assert {"latepage/py.typed", "latepage/_core.pyi"} <= set(archive.namelist())


def test_one_wheel_is_for_every_python_and_for_more_machines_than_this(wheel: Path) -> None:
    *_, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("cp311", "abi3")
    assert platform.startswith("manylinux_"), "maturin found symbols that other machines need not have"


def test_the_version_is_the_crates(empty_venv: Path) -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert run(empty_venv, "latepage", "--version").strip() == version[1]


def test_it_is_the_wheel_that_is_imported(empty_venv: Path) -> None:
    place = run(empty_venv, "python", "-c", "import latepage._core; print(latepage._core.__file__)").strip()
    assert Path(place).is_relative_to(empty_venv / "venv")


def test_every_module_of_the_wheel_is_there_or_names_its_extra(empty_venv: Path) -> None:
    script = """
import importlib, json, pkgutil, latepage
failed = {}
for module in pkgutil.walk_packages(latepage.__path__, "latepage."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            failed[module.name] = str(error.name)
print(json.dumps(failed))
"""
    lacking = set(json.loads(run(empty_venv, "python", "-c", script)).values())
    assert {name.partition(".")[0] for name in lacking} <= {"matplotlib", "numpy", "textual"}


def test_the_help_of_every_command_needs_no_extra(empty_venv: Path) -> None:
    listed = run(empty_venv, "latepage", "--help")
    commands = re.findall(r"^│ ([a-z]+)\b", listed, re.MULTILINE)
    assert "serve" in commands
    for command in commands:
        assert f"latepage {command}" in run(empty_venv, "latepage", command, "--help")


@pytest.mark.needs("/dev/userfaultfd")
def test_it_serves_a_vm(empty_venv: Path) -> None:
    small = ("--memory", "16MiB", "--fill", "7", "--save", "vm.state", "vm.mem")
    run(empty_venv, "latepage", "vm", "run", *small)
    serve: list[str | Path] = [empty_venv / "venv/bin/latepage", "serve", "pager.sock", "vm.mem", "--json"]
    with LineProcess(serve, cwd=empty_venv, env={"PATH": "/usr/bin:/bin"}) as pager:
        pager.event("listening")
        run(empty_venv, "latepage", "vm", "restore", "vm.state", "--pager", "pager.sock", "--verify", "random", "--compare")
        started = pager.event("session-started")
        pager.event("ended", vm=started["vm"])
